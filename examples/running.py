"""What the examples that pretrain share: rates, checkpoints, and signals that end a run between two steps."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, lr: float, embed_lr: float) -> list[dict[str, Any]]:
    """A LLaMA's projections, dense or factors, and the rest: embedding, head and norms."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["_proj." in name].append(parameter)
    return [{"params": groups[True], "lr": lr}, {"params": groups[False], "lr": embed_lr}]


def relative_lr(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def save(path: Path, saved: dict[str, Any]) -> None:
    """Writes a file by torch.save beside the old one and puts it in its place, so that there is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(saved, partial)
    os.replace(partial, path)


def load(path: Path, keys: Collection[str], device: str = "cpu") -> dict[str, Any]:
    """What ``save`` wrote. Raises ValueError where the file is something else, or lacks one of the keys."""
    try:
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        for key in keys:
            saved[key]
    except Exception as error:  # torch.load raises what the bytes lead it to
        raise ValueError(
            f"{path} is no checkpoint of this program ({type(error).__name__}): give another --out, or delete it"
        ) from error
    return saved


class Stop:
    """Holds SIGINT and SIGTERM back until a step is complete: a checkpoint must not hold half of one.

    ``asked`` is the number of the signal that came, 0 for none.
    """

    def __enter__(self) -> Stop:
        self.asked = 0
        self.before = {each: signal.signal(each, self.handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, _: Any) -> None:
        self.asked = number

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
