"""The table of the runs, and the drawing of their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.quality.records import Records
from examples.quality.search import ROWS, choose
from examples.quality.settings import Settings

DENSE = ROWS[0].name


class NotMade(LookupError):
    """A run that a row needs is not among the records."""


@dataclass(frozen=True)
class Result:
    """A row of one rung: its chosen settings and the runs with them, one a seed."""

    name: str
    settings: Settings
    runs: list[Mapping[str, Any]]

    @property
    def losses(self) -> list[float]:
        """On the test part."""
        return [each["test"] for each in self.runs if "test" in each]


def results(records: Records, corpus: str, width: int, steps: int) -> tuple[list[Result], list[str]]:
    """The rows whose search is complete, and the names of those where it is not."""
    here = [each for each in records if (each["corpus"], each["width"], each["steps"]) == (corpus, width, steps)]
    text = here[-1]["text"] if here else ""

    def find(settings: Settings) -> Mapping[str, Any]:
        found = records.find(settings, text)
        if found is None:
            raise NotMade
        return found

    complete, missing = [], []
    for row in ROWS:
        try:
            chosen = choose(row, corpus, width, steps, find)
            first = find(chosen)
        except NotMade:
            missing.append(row.name)
            continue
        runs = [first]
        while (more := records.find(replace(chosen, seed=len(runs)), text)) is not None:
            runs.append(more)
        complete.append(Result(row.name, chosen, runs))
    return complete, missing


def show(records: Records, corpora: Iterable[str], widths: Iterable[int], plot: Path | None, console: Console) -> None:
    """Prints a table for each rung that has runs, and what else was tried there; draws the curves.

    Raises:
        ValueError: There are no runs, or the drawing's file is neither .png nor .svg.
    """
    rungs = sorted({(each["corpus"], each["width"], each["steps"]) for each in records})
    rungs = [each for each in rungs if each[0] in corpora and each[1] in widths]
    if not rungs:
        raise ValueError(f"{records.path} has no runs of these corpora and widths")
    drawn = {}
    for rung in rungs:
        complete, missing = results(records, *rung)
        drawn[rung] = complete
        console.print(_table(records, rung, complete), markup=False)
        if missing:
            console.print(f"not complete: {', '.join(missing)}", highlight=False)
        _show_others(records, rung, complete, console)
    if plot is not None:
        draw(drawn, plot)


def _table(records: Records, rung: tuple[str, int, int], complete: list[Result]) -> Table:
    corpus, width, steps = rung
    tokens = next(each["tokens"] for each in records if (each["corpus"], each["width"], each["steps"]) == rung)
    dense = next((each for each in complete if each.name == DENSE), None)
    per_parameter = f", {tokens / dense.runs[0]['parameters']:.1f} a parameter of the dense model" if dense else ""
    table = Table(title=f"{corpus}, width {width}, {steps} steps: {tokens:,} tokens{per_parameter}")
    columns = ("", "lr", "embed_lr", "init_std", "alpha", "test loss, mean ± sd (seeds)", "perplexity", "÷ dense")
    for name in (*columns, "projections", "÷ dense"):
        table.add_column(name, justify="right" if name else "left")
    for each in complete:
        chosen, losses = each.settings, each.losses
        alpha = "" if chosen.kind == "dense" else str(chosen.alpha)
        described = [each.name, f"{chosen.lr:g}", f"{chosen.embed_lr:g}", f"{chosen.init_std:g}", alpha]
        if not losses:
            table.add_row(*described, f"diverged at step {each.runs[0]['diverged']}")
            continue
        mean = statistics.fmean(losses)
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        against = math.exp(mean - statistics.fmean(dense.losses)) if dense and dense.losses else math.nan
        size = each.runs[0]["projections"]
        smaller = size / dense.runs[0]["projections"] if dense else math.nan
        loss = f"{mean:.4f} ± {spread:.4f} ({len(losses)})"
        if len(losses) < len(each.runs):
            loss += f", {len(each.runs) - len(losses)} diverged"
        table.add_row(*described, loss, f"{math.exp(mean):.2f}", f"{against:.3f}", f"{size:,}", f"{smaller:.2f}")
    return table


def _show_others(records: Records, rung: tuple[str, int, int], complete: list[Result], console: Console) -> None:
    """Every factorized run of the first seed, by how its settings differ from the row at dense's rates."""
    at_dense = next((each for each in complete if each.name == "SL, dense's rates"), None)
    if at_dense is None:
        return
    table = Table("SL at dense's rates, but", "validation loss", title="also tried, seed 0")
    table.columns[1].justify = "right"
    for record in records:
        if (record["corpus"], record["width"], record["steps"]) != rung or record["kind"] == "dense" or record["seed"]:
            continue
        there = Settings.of(record)
        names = [each.name for each in fields(Settings)]
        changes = [
            f"{name} {getattr(there, name)}"
            for name in names
            if getattr(there, name) != getattr(at_dense.settings, name)
        ]
        loss = f"{record['validation']:.4f}" if "validation" in record else f"diverged at step {record['diverged']}"
        table.add_row(", ".join(changes) or "(nothing)", loss)
    console.print(table, markup=False)


def draw(drawn: Mapping[tuple[str, int, int], list[Result]], path: Path) -> None:
    """Draws, for each corpus, training loss by tokens and test perplexity by parameters.

    Raises:
        ValueError: The file is neither .png nor .svg.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {path.name!r}")
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    corpora = sorted({corpus for corpus, _, _ in drawn})
    figure = Figure(figsize=(12, 4.5 * len(corpora)), layout="constrained")
    axes = figure.subplots(len(corpora), 2, squeeze=False)
    colors = {row.name: f"C{index}" for index, row in enumerate(ROWS)}
    for (curves, sizes), corpus in zip(axes, corpora, strict=True):
        points: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for (name, _, steps), rung in drawn.items():
            if name != corpus:
                continue
            for each in rung:
                run = each.runs[0]
                tokens = [step * run["tokens"] / run["steps"] for step, _ in run["curve"]]
                curves.plot(tokens, [loss for _, loss in run["curve"]], color=colors[each.name], linewidth=1)
                if each.losses:
                    perplexity = math.exp(statistics.fmean(each.losses))
                    points.setdefault((each.name, steps), []).append((run["parameters"], perplexity))
        for name, color in colors.items():
            curves.plot([], [], color=color, label=name)
        for (name, _), places in points.items():
            sizes.plot(*zip(*sorted(places), strict=True), "o-", color=colors[name])
        curves.set(title=f"{corpus}: training loss (nats a token)", xlabel="tokens", xscale="log")
        sizes.set(title=f"{corpus}: test perplexity", xlabel="parameters, embeddings included", xscale="log")
        curves.legend(fontsize="small")
    figure.savefig(path)
