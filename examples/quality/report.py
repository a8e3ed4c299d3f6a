"""The table of the runs, and the drawing of their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.quality.drawing import Best, Rung, draw
from examples.quality.records import Records
from examples.quality.search import ROWS, AllDiverged, choose
from examples.quality.settings import Settings

DENSE = ROWS[0].name
PARTS = ("validation", "test")


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


def results(
    records: Records, corpus: str, width: int, steps: int, axes: Collection[str]
) -> tuple[list[Result], list[str]]:
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
            chosen = choose(row, corpus, width, steps, find, axes)
            first = find(chosen)
        except NotMade:
            missing.append(row.name)
            continue
        except AllDiverged:
            missing.append(f"{row.name} (diverged at every rate)")
            continue
        runs = [first]
        while (more := records.find(replace(chosen, seed=len(runs)), text)) is not None:
            runs.append(more)
        complete.append(Result(row.name, chosen, runs))
    return complete, missing


def show(
    records: Records,
    corpora: Iterable[str],
    widths: Iterable[int],
    axes: Collection[str],
    plot: Path | None,
    console: Console,
) -> None:
    """Prints for each rung the rows whose search over ``axes`` is complete, and all its runs; draws the curves.

    Raises:
        ValueError: There are no runs, or the drawing's file is neither .png nor .svg.
    """
    rungs = sorted({(each["corpus"], each["width"], each["steps"]) for each in records})
    rungs = [each for each in rungs if each[0] in corpora and each[1] in widths]
    if not rungs:
        raise ValueError(f"{records.path} has no runs of these corpora and widths")
    for rung in rungs:
        complete, missing = results(records, *rung, axes)
        if complete:
            console.print(_table(records, rung, complete), markup=False)
            console.print(f"searched in each row: {', '.join(axes)}", highlight=False)
        if missing:
            console.print(f"not complete: {'; '.join(missing)}", highlight=False)
        console.print(_all_runs(records, rung), markup=False)
    if plot is not None:
        draw({rung: _best(records, rung) for rung in rungs}, plot)


def _table(records: Records, rung: Rung, complete: list[Result]) -> Table:
    corpus, width, steps = rung
    tokens = next(each["tokens"] for each in records if (each["corpus"], each["width"], each["steps"]) == rung)
    dense = next((each for each in complete if each.name == DENSE), None)
    per_parameter = f", {tokens / dense.runs[0]['parameters']:.1f} a parameter of the dense model" if dense else ""
    table = Table(title=f"{corpus}, width {width}, {steps} steps: {tokens:,} tokens{per_parameter}")
    columns = ("", "lr", "embed_lr", "init_std", "alpha", "test loss, mean ± sd (seeds)", "perplexity", "÷ dense")
    for name in (*columns, "projections", "÷ dense"):
        table.add_column(name, justify="right" if name else "left")
    for row in complete:
        chosen, losses = row.settings, row.losses
        alpha = "" if chosen.has_dense_weights else str(chosen.alpha)
        described = [row.name, f"{chosen.lr:g}", f"{chosen.embed_lr:g}", f"{chosen.init_std:g}", alpha]
        if not losses:
            table.add_row(*described, f"diverged at step {row.runs[0]['diverged']}")
            continue
        mean = statistics.fmean(losses)
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        against = math.exp(mean - statistics.fmean(dense.losses)) if dense and dense.losses else math.nan
        size = row.runs[0]["projections"]
        smaller = size / dense.runs[0]["projections"] if dense else math.nan
        loss = f"{mean:.4f}{spread} ({len(losses)})"
        if len(losses) < len(row.runs):
            loss += f", {len(row.runs) - len(losses)} diverged"
        table.add_row(*described, loss, f"{math.exp(mean):.2f}", f"{against:.3f}", f"{size:,}", f"{smaller:.2f}")
    return table


Group = tuple[Settings, list[Mapping[str, Any]]]
"""Settings, but for the seed, and the runs with them."""


def _groups(records: Records, rung: Rung) -> list[Group]:
    """The runs of a rung, the seeds of the same settings together, the best first and last those that diverged."""
    groups: dict[Settings, list[Mapping[str, Any]]] = {}
    for record in records:
        if (record["corpus"], record["width"], record["steps"]) == rung:
            groups.setdefault(replace(Settings.of(record), seed=0), []).append(record)
    return sorted(groups.items(), key=lambda group: _mean(group[1], "validation"))


def _mean(runs: Iterable[Mapping[str, Any]], part: str) -> float:
    """Mean loss of the runs that came to their end; infinite where none did."""
    losses = [each[part] for each in runs if part in each]
    return statistics.fmean(losses) if losses else math.inf


def _best(records: Records, rung: Rung) -> Best:
    """The best settings of each kind, with the runs that came to their end."""
    best: dict[str, Group] = {}
    for settings, runs in _groups(records, rung):
        if ended := [each for each in runs if "test" in each]:
            best.setdefault(settings.kind, (settings, ended))
    return best


def _all_runs(records: Records, rung: Rung) -> Table:
    """Every run of a rung, the seeds of the same settings together, the best first."""
    table = Table(title="every run, mean over its seeds")
    for name in ("kind", "lr", "embed_lr", "and"):
        table.add_column(name)
    for name in ("seeds", "validation", "test"):
        table.add_column(name, justify="right")
    shown = {"kind", "corpus", "width", "steps", "lr", "embed_lr", "seed"}
    others = [each for each in fields(Settings) if each.name not in shown]
    for settings, runs in _groups(records, rung):
        values = {each.name: getattr(settings, each.name) for each in others}
        changes = [f"{each.name} {values[each.name]}" for each in others if values[each.name] != each.default]
        described = (settings.kind, f"{settings.lr:g}", f"{settings.embed_lr:g}", ", ".join(changes), str(len(runs)))
        means = [_mean(runs, part) for part in PARTS]
        diverged = [f"diverged at step {runs[0]['diverged']}", ""]
        table.add_row(*described, *(diverged if math.inf in means else [f"{each:.4f}" for each in means]))
    return table
