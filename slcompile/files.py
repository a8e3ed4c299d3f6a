"""Files of a model, written near their target and moved into place, so that no kill leaves a mix of two models."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
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
        what = "is a file" if path.parent.exists() else "does not exist"
        raise ValueError(f"path's directory {path.parent} {what}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"path's directory {path.parent} cannot be written")
    return path


def writable_directory(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a directory to be written, or to be made.

    Raises:
        ValueError: It is a file, or cannot be written; or it is to be made in one that does not exist or cannot be.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"directory must be a directory, got the file {path}")
    if not path.exists():
        writable_file(path.parent / "any")
    elif not os.access(path, os.W_OK):
        raise ValueError(f"directory {path} cannot be written")
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


@contextmanager
def inside(directory: Path) -> Iterator[Path]:
    """Yields a scratch directory in a directory, which may be a link or mounted; gone afterwards whatever happens.

    The directory is made where there is none, and removed again where nothing was moved into it.
    """
    is_new = not directory.exists()
    directory.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".slcompile-") as scratch:
            yield Path(scratch)
    except BaseException:
        if is_new:
            with suppress(OSError):  # it is not empty
                directory.rmdir()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file, moved into place when it is whole; returns its absolute path. Raises as ``writable_file``."""
    target = writable_file(path)
    with beside(target) as scratch:
        (scratch / target.name).write_text(text, encoding="utf-8")
        move_into_place(scratch, target.parent, last=target.name)
    return target


def move_into_place(scratch: Path, directory: Path, *, last: str, stale: Set[str] = frozenset()) -> None:
    """Moves all files of ``scratch`` into ``directory``; the names of the others than ``last`` are new there.

    Args:
        last: Name of the file that refers to the others. It is moved last and in one step: before, the old one is
            valid, afterwards the new one.
        stale: Names that only the old one used; removed at the end.
    """
    files = sorted(scratch.iterdir())
    _synchronize(*files)
    for file in files:
        if file.name != last:
            os.replace(file, directory / file.name)
    _synchronize(directory)
    os.replace(scratch / last, directory / last)
    _synchronize(directory)
    _remove(directory, stale - {each.name for each in files})


UNFINISHED = (
    "slcompile moves files into this directory. If nothing runs that does, it was cut off: save the model again."
)


def move_over(scratch: Path, directory: Path, *, last: str, stale: Set[str] = frozenset()) -> None:
    """Moves all files of ``scratch`` into ``directory``, where an old model's may have the same names.

    Where there are others than ``last``, it is made unreadable first, and takes its place when all else is there: a
    kill leaves the old model, the new one, or a directory that is refused.

    Args:
        last: Name of the file that everything that reads the others reads.
        stale: Names that only the old one used; removed.
    """
    files = sorted(scratch.iterdir())
    if [each.name for each in files] == [last]:
        move_into_place(scratch, directory, last=last, stale=stale)
        return
    unfinished = scratch / f"{last}.unfinished"
    unfinished.write_text(UNFINISHED, encoding="utf-8")
    _synchronize(*files, unfinished)  # what can fail does so while the old model is whole
    os.replace(unfinished, directory / last)
    _synchronize(directory)
    _remove(directory, stale - {last})
    move_into_place(scratch, directory, last=last)


def _remove(directory: Path, names: Set[str]) -> None:
    for name in sorted(names):
        (directory / name).unlink(missing_ok=True)
    _synchronize(directory)


def _synchronize(*paths: Path) -> None:
    """Returns when the files, or what is in the directories, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
