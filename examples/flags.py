"""What the programs here take as flags: argparse's types, which refuse a bad value before any work is done.

Each returns a function from text to a value. Its error names what is allowed and what it got; argparse adds the flag.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slcompile


def whole(least: int) -> Callable[[str], int]:
    """An int of at least so much."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an int of at least {least}, got {text!r}")
        return value

    return read


def above_0(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    """A float, NaN where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def option(name: str, **others: Any) -> Callable[[str], Any]:
    """A value that ``SLConfig`` takes for this field, beside ``others``: an int or float where it reads as one."""

    def read(text: str) -> Any:
        try:
            value: Any = int(text) if text.isdecimal() else float(text)
        except ValueError:
            value = text
        try:
            slcompile.SLConfig(**{name: value}, **others)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return read


def file(text: str) -> Path:
    """A file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text!r}")
    return path


def folder(text: str) -> Path:
    """A directory that can be written, or made."""
    path = Path(text)
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"must be a directory that can be written or made, got {text!r}: see {there}")
    return path


def chart(text: str) -> Path:
    """A .png or .svg file in a directory that is there."""
    path = Path(text)
    if path.suffix not in (".png", ".svg") or path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .png or .svg file in a directory that is there, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('needs matplotlib: pip install "slcompile[plot]"')
    return path


def device(text: str) -> str:
    """A device that is there."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] + ([accelerator.type] if accelerator else [])
    if text.partition(":")[0] not in kinds:
        raise argparse.ArgumentTypeError(f"must be one of {kinds} here, got {text!r}")
    return text
