"""The rows of the table, and the search that each of them gets: the same for all.

A row's learning rate is tried at four points a factor of two apart, and further while the best lies at an edge; then
its scale (of the start, of the low-rank part, or of the sparse part's steps) at three, then the learning rate of
embedding, head and norms at three. The choice is by the validation loss of one seed. Rows that follow another take its
choice without a search of their own: what they would get from a user who has tuned that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from examples.quality.settings import Settings

Run = Callable[[Settings], Mapping[str, Any]]
"""Trains, or finds, a run; returns its record."""

EXTENSIONS = 3  # of the grid of learning rates, at either edge


class AllDiverged(ValueError):
    """Of a row's candidates, every one diverged."""


@dataclass(frozen=True)
class Row:
    """A row of the table: what is fixed in it, where its search starts, or which row it follows.

    Args:
        name: In the table.
        fixed: Settings that are not searched.
        lr: The grid of learning rates.
        scale: Name and grid of what sets its scale, the first point being where the search starts.
        follows: The row whose learning rates and init_std are taken instead.
    """

    name: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    lr: tuple[float, ...] = ()
    scale: tuple[str, tuple[float, ...]] = ("", ())
    follows: str | None = None


AXES = ("lr", "scale", "embed_lr")
"""What may be searched, in this order; the same for every row."""

EMBED_LR = (5e-3, 2.5e-3, 1e-2)
PAPER = {"kind": "sl", "alpha": 16.0, "support": "uniform"}
LOW_RANK = {"kind": "low rank", "init": "spectral", "init_std": 0.02}
ROWS = (
    Row("dense, tuned", {"kind": "dense"}, (5e-4, 1e-3, 2e-3, 4e-3), ("init_std", (0.006, 0.002, 0.02))),
    Row("GaLore, tuned", {"kind": "galore"}, (2e-3, 4e-3, 8e-3, 1.6e-2), ("init_std", (0.006, 0.002, 0.02))),
    Row("low rank alone, tuned", LOW_RANK, (5e-4, 1e-3, 2e-3, 4e-3), ("init_std", (0.02, 0.006, 0.05))),
    Row("SL as in the paper, tuned", PAPER, (1e-3, 2e-3, 4e-3, 8e-3), ("alpha", (16.0, 32.0, 8.0))),
    Row("SL as in the paper, dense's rates", PAPER, follows="dense, tuned"),
    Row("SL, dense's rates", {"kind": "sl"}, follows="dense, tuned"),
    Row("SL, faster values, dense's rates", {"kind": "sl", "values_rate": 4.0}, follows="dense, tuned"),
    Row(
        "SL, vector support, faster values, dense's rates",
        {"kind": "sl", "support": "vector", "values_rate": 4.0},
        follows="dense, tuned",
    ),
    Row("SL, tuned", {"kind": "sl"}, (5e-4, 1e-3, 2e-3, 4e-3), ("values_rate", (1.0, 4.0, 12.0))),
)


def choose(row: Row, corpus: str, width: int, steps: int, run: Run, axes: Collection[str] = AXES) -> Settings:
    """The settings of a row on one corpus and rung, found by its search or taken from the row it follows.

    Where time is short ``axes`` restricts the search, of every row alike: the others stay at their first points.

    Raises:
        AllDiverged: Every rate diverged.
    """
    where = {"corpus": corpus, "width": width, "steps": steps}
    if row.follows is not None:
        leader = next(each for each in ROWS if each.name == row.follows)
        chosen = choose(leader, corpus, width, steps, run, axes)
        taken = {name: getattr(chosen, name) for name in ("lr", "embed_lr", "init_std")}
        return Settings.of({**where, **taken, **row.fixed})
    name, scales = row.scale
    start = Settings.of({**where, "lr": row.lr[0], "embed_lr": EMBED_LR[0], **row.fixed})
    best = _best_lr(start, row, run) if "lr" in axes else start
    if "scale" in axes:
        best = _best([replace(best, **{name: each}) for each in scales], row, run)
    if "embed_lr" in axes:
        best = _best([replace(best, embed_lr=each) for each in EMBED_LR], row, run)
    return best


def _best_lr(start: Settings, row: Row, run: Run) -> Settings:
    rates = sorted(row.lr)
    for _ in range(EXTENSIONS + 1):
        best = _best([replace(start, lr=each) for each in rates], row, run)
        if best.lr == rates[0]:
            rates.insert(0, rates[0] / 2)
        elif best.lr == rates[-1]:
            rates.append(rates[-1] * 2)
        else:
            break
    return best


def _best(candidates: Sequence[Settings], row: Row, run: Run) -> Settings:
    losses = [run(each).get("validation", math.inf) for each in candidates]
    if min(losses) == math.inf:
        raise AllDiverged(f"{row.name}: every one of these diverged: {candidates}")
    return candidates[losses.index(min(losses))]
