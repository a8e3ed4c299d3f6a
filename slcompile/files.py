"""Files of a model, written beside their target and moved into place, so that a kill leaves the old one whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path


def writable_file(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a file to be written.

    Raises:
        ValueError: It is a directory, or its directory does not exist or cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise ValueError(f"path must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise ValueError(f"path's directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"path's directory {path.parent} cannot be written")
    return path


def require_space(directory: Path, size: int) -> None:
    """Raises OSError (ENOSPC) where ``size`` bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the weights take {size:,} bytes and {free:,} are free", str(directory))


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yields a scratch directory on the target's file system, gone afterwards whatever happens."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        yield Path(scratch)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file, moved into place when it is whole; returns its absolute path. Raises as ``writable_file``."""
    target = writable_file(path)
    with beside(target) as scratch:
        (scratch / target.name).write_text(text, encoding="utf-8")
        move_into_place(scratch, target.parent, last=target.name)
    return target


def move_into_place(scratch: Path, directory: Path, *, last: str, stale: Set[str] = frozenset()) -> None:
    """Moves all files of ``scratch`` into ``directory``.

    Args:
        last: Name of the file that refers to the others. It is moved last and in one step: before, the old one is
            valid, afterwards the new one.
        stale: Names that only the old one used; removed at the end.
    """
    files = sorted(scratch.iterdir(), key=lambda each: each.name == last)
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(file, directory / file.name)
    for name in stale - {each.name for each in files}:
        (directory / name).unlink(missing_ok=True)


CHART_FORMATS = (".png", ".svg")


def plot_file(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a chart to be drawn.

    Raises:
        ValueError: It is no .png or .svg, or cannot be written.
        ImportError: matplotlib is not installed.
    """
    target = writable_file(path)
    if target.suffix not in CHART_FORMATS:
        raise ValueError(f"path of the chart must end in {' or '.join(CHART_FORMATS)}, got {target.name!r}")
    try:
        import matplotlib  # noqa: F401 (found before there is anything to draw)
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "slcompile[plot]"') from error
    return target
