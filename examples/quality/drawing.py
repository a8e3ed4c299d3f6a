"""The drawing of the runs: loss curves, and perplexity against parameters, memory and FLOPs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.quality.settings import KINDS, RUNGS, VOCAB, Settings

Rung = tuple[str, int, int]
Best = Mapping[str, tuple[Settings, Sequence[Mapping[str, Any]]]]
"""By kind, the settings whose mean loss on the validation part is the lowest, and their runs, one a seed."""

MARKERS = "osD^vP"
"""By the number of steps."""


def memory(settings: Settings, run: Mapping[str, Any]) -> float:
    """Bytes of weights, gradients and AdamW's moments in float32, of a GaLore run with its projections."""
    parameters, moments = run["parameters"], 2 * run["parameters"]
    if settings.kind == "galore":
        moments = 2 * (parameters - run["projections"]) + sum(
            settings.square_rank * (2 * max(shape) + min(shape)) for shape in _projections(settings.width)
        )
    return 4 * (2 * parameters + moments * settings.bits / 32)


def flops(settings: Settings, run: Mapping[str, Any]) -> float:
    """Floating-point operations of all products with weights, forward and backward, factors as they are factored."""
    return 6.0 * run["tokens"] * (run["projections"] + VOCAB * settings.width)


def _projections(width: int) -> list[tuple[int, int]]:
    rung = RUNGS[width]
    return rung.layers * (4 * [(width, width)] + 3 * [(rung.intermediate, width)])


def draw(rungs: Mapping[Rung, Best], path: Path) -> None:
    """Draws, for each corpus, the best run of each kind: training loss by tokens, and test perplexity by what it took.

    Raises:
        ValueError: The file is neither .png nor .svg.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {path.name!r}")
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    corpora = sorted({corpus for corpus, _, _ in rungs})
    lengths = sorted({steps for _, _, steps in rungs})
    markers = {steps: MARKERS[index % len(MARKERS)] for index, steps in enumerate(lengths)}
    colors = {kind: f"C{index}" for index, kind in enumerate(KINDS)}
    figure = Figure(figsize=(19, 4.5 * len(corpora)), layout="constrained")
    rows = figure.subplots(len(corpora), 4, squeeze=False)
    for (curves, *panels), corpus in zip(rows, corpora, strict=True):
        for (name, _, steps), best in rungs.items():
            if name != corpus:
                continue
            for kind, (settings, runs) in best.items():
                tokens = [step * runs[0]["tokens"] / steps for step, _ in runs[0]["curve"]]
                curves.plot(tokens, [loss for _, loss in runs[0]["curve"]], color=colors[kind], linewidth=1)
                perplexity = math.exp(statistics.fmean(each["test"] for each in runs))
                costs = runs[0]["parameters"], memory(settings, runs[0]), flops(settings, runs[0])
                for panel, cost in zip(panels, costs, strict=True):
                    panel.plot(cost, perplexity, markers[steps], color=colors[kind])
        for kind, color in colors.items():
            curves.plot([], [], color=color, label=kind)
        for steps, marker in markers.items():
            curves.plot([], [], marker, color="gray", label=f"{steps} steps")
        curves.set(title=f"{corpus}: training loss (nats a token)", xlabel="tokens", xscale="log")
        curves.legend(fontsize="small")
        for panel, label in zip(
            panels, ("parameters, embeddings included", "bytes of weights, gradients and states", "FLOPs"), strict=True
        ):
            panel.set(title=f"{corpus}: test perplexity", xlabel=label, xscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.grid(alpha=0.3)
    figure.savefig(path)
