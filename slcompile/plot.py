"""Drawings: a memory report as a stacked bar chart, and the spectra of factorized weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from slcompile.export.files import beside, move_into_place, writable_file
from slcompile.liveness import PARTS
from slcompile.memory import MemoryReport
from slcompile.spectra import Spectra

FORMATS = (".png", ".svg")


def plot_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a chart to be drawn.

    Raises:
        ValueError: It is no .png or .svg, or cannot be written.
        ImportError: matplotlib is not installed.
    """
    target = writable_file(path)
    if target.suffix not in FORMATS:
        raise ValueError(f"path of the chart must end in {' or '.join(FORMATS)}, got {target.name!r}")
    try:
        import matplotlib  # noqa: F401 (found before there is anything to draw)
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "slcompile[plot]"') from error
    return target


def plot_memory(report: MemoryReport, path: str | os.PathLike[str]) -> Path:
    """Draws what is allocated at the peak, in GB; returns the file. Raises as ``plot_file``."""
    target = plot_file(path)
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    variants = report.variants()
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    below = [0.0] * len(variants)
    for index, part in enumerate(PARTS):
        heights = [usage.at_peak[part] / 1e9 for usage in variants.values()]
        if max(heights) > 0.002 * report.dense.peak / 1e9:
            axes.bar(list(variants), heights, bottom=below, width=0.6, label=part, color=f"C{index}")
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for position, total in enumerate(below):
        label = f"{total:.1f} GB" if total >= 10 else f"{total:.2f} GB"
        axes.text(position, total, label, ha="center", va="bottom", fontweight="bold")
    axes.set_ylabel("GB at the peak of a training step")
    axes.set_title(", ".join(f"{key} {value}" for key, value in report.settings.items()), fontsize=8)
    axes.margins(y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with beside(target) as scratch:
        figure.savefig(scratch / target.name, dpi=150)
        move_into_place(scratch, target.parent, last=target.name)
    return target


def plot_spectra(spectra: Mapping[str, Spectra], path: str | os.PathLike[str]) -> Path:
    """Draws the singular values of each weight, a panel for ``s B A``, ``S`` and ``W``; returns the file.

    Args:
        spectra: What ``slcompile.spectra`` returns; not empty. Of a stack of matrices the mean is drawn.
        path: A .png or .svg.

    Raises:
        ValueError, ImportError: As ``plot_file``.
    """
    target = plot_file(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (part, title) in zip(panels, (("low_rank", "s B A"), ("sparse", "S"), ("weight", "W")), strict=True):
        for name, each in spectra.items():
            values = getattr(each, part)
            values = values.reshape(-1, values.shape[-1]).mean(0)
            axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
        mean = sum(each.effective_ranks[part] for each in spectra.values()) / len(spectra)
        axes.set(title=f"{title}: effective rank {mean:.1f} on average", xlabel="singular value, by size")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("size")
    if len(spectra) <= 30:
        panels[2].legend(frameon=False, fontsize="xx-small", loc="center left", bbox_to_anchor=(1, 0.5))
    with beside(target) as scratch:
        figure.savefig(scratch / target.name, dpi=150)
        move_into_place(scratch, target.parent, last=target.name)
    return target
