"""A memory report as a stacked bar chart: a bar for each variant, a piece for each part at the peak."""

from __future__ import annotations

import os
from pathlib import Path

from slcompile.files import beside, move_into_place, plot_file
from slcompile.memory.report import MemoryReport
from slcompile.passes.liveness import PARTS


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
