"""Compiles every kernel for GPUs that need not be there, and prints what each takes and the least time it can take.

    python examples/kernel_table.py
    python examples/kernel_table.py --targets sm_90 gfx942 --sizes 7B

Needs ``pip install "slcompile[examples]"`` and Triton, no GPU. About a minute a target.

Shapes are the paper's attention and MLP projections, in bfloat16 with the stratified support: 1B with rank 512 and
density 0.03, 7B with rank 1024 and density 0.05. The factored matmuls have 16 tokens. Dense products are the vendor's.

Bytes count each operand once, as if caches were perfect; of an entry that is read alone, a sector of 32 bytes. FLOPs
are those of products, not of the hash that finds the non-zeros. The time is the larger of bytes / bandwidth and FLOPs /
peak, both as the vendors state them (``slcompile/cost/devices.py``).
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slcompile.cost import GPU_CLASSES
from slcompile.cost.matmul import SPLIT
from slcompile.kernels import entries, linear_factored, project
from slcompile.kernels.offline import Launch, Resources, compile_launch, recorded, resources
from slcompile.ops.support import groups_per_row

DTYPE = torch.bfloat16
TOKENS = 16
SECTOR = 32
SCALE = 0.5
PEAK = {each.name: each.peak for each in GPU_CLASSES}
"""FLOP/s and bytes/s of a target."""


class Size(NamedTuple):
    """A model of the paper."""

    rank: int
    density: float
    shapes: tuple[tuple[int, int], ...]
    """Rows and columns of its weights."""


SIZES = {
    "1B": Size(512, 0.03, ((2048, 2048), (5461, 2048))),
    "7B": Size(1024, 0.05, ((4096, 4096), (11008, 4096))),
}


class Call(NamedTuple):
    """A call of one of our functions."""

    name: str
    run: Callable[[], Any]
    launches: list[tuple[str, int, int]]
    """For each launch that it makes: name, elements moved (of two bytes each), and FLOPs."""


class Work(NamedTuple):
    """One kernel's work at one shape."""

    name: str
    launch: Launch
    moved: int
    """Bytes."""
    flops: int


class Row(NamedTuple):
    """A line of the table."""

    kernel: str
    target: str
    shape: str
    usage: Resources
    moved: int
    flops: int
    seconds: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]"
    )
    parser.add_argument("--targets", nargs="+", type=one_of(PEAK), default=["sm_80", "sm_90"], help=names(PEAK))
    parser.add_argument("--sizes", nargs="+", type=one_of(SIZES), default=[*SIZES], help=names(SIZES))
    return parser.parse_args(argv)


def names(allowed: Iterable[str]) -> str:
    """The names that a flag takes, as text."""
    return "any of " + ", ".join(allowed)


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """A type for argparse that refuses other names, and says which comes near."""

    def check(name: str) -> str:
        if name in allowed:
            return name
        near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
        raise argparse.ArgumentTypeError(f"must be {names(allowed)}, got {name!r}; the nearest is {near[0]!r}")

    return check


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    size: Size, rows: int, columns: int, *, tokens: int = TOKENS, vector: int = 1, make: Callable[..., Tensor] = empty
) -> list[Call]:
    """Every function that launches kernels, at one shape.

    Args:
        size: The model.
        rows, columns: Of its weight.
        tokens: Of the factored matmuls.
        vector: Rows that share their columns.
        make: Makes the operands: ``make(*shape)`` in ``DTYPE``, or of another dtype by keyword.
    """
    rank, groups = size.rank, groups_per_row(columns, size.density)
    B, A, values, seed = make(rows, rank), make(rank, columns), make(rows, groups), make(1, dtype=torch.int64)
    x, grad, hidden, W = make(tokens, columns), make(tokens, rows), make(tokens, rank), make(rows, columns)
    non_zeros, sector = rows * groups, SECTOR // DTYPE.itemsize
    splits, back_splits = triton.cdiv(columns, SPLIT), triton.cdiv(rows, SPLIT)
    forward = tokens * (columns + rank + rows) + rank * rows + non_zeros
    backward = tokens * (rows + rank) + rank * columns + non_zeros + 2 * back_splits * tokens * columns
    factored = functools.partial(linear_factored.linear_factored, vector=vector)
    return [
        Call(
            "add",
            lambda: entries.add_(W, values, seed, columns, vector),
            [("add", non_zeros * (1 + 2 * sector), 0)],
        ),
        Call("read", lambda: entries.read(W, values, seed, vector), [("read", non_zeros * (1 + sector), 0)]),
        Call(
            "project",
            lambda: project.project(x, [A], [SCALE]),
            [
                (
                    "project",
                    tokens * columns + rank * columns + 2 * splits * tokens * rank,
                    2 * tokens * rank * columns,
                ),
                ("sum_splits", (2 * splits + 1) * tokens * rank, 0),
            ],
        ),
        Call(
            "linear_factored",
            lambda: factored(x, [hidden], [B], [values], [seed]),
            [("linear_factored", forward, 2 * tokens * (rank * rows + non_zeros))],
        ),
        Call(
            "linear_factored, transposed",
            lambda: factored(grad, [hidden], [A], [values], [seed], transposed=True),
            [
                ("linear_factored, transposed", backward, 2 * tokens * (rank * columns + non_zeros)),
                ("sum_splits, transposed", (2 * back_splits + 1) * tokens * columns, 0),
            ],
        ),
    ]


def roofline(moved: int, flops: int, target: str) -> float:
    """The least seconds, by the vendor's figures."""
    peak, bandwidth = PEAK[target]
    return max(moved / bandwidth, flops / peak)


def works(target: str, size: Size, rows: int, columns: int) -> list[Work]:
    """Every kernel, at one shape."""
    result = []
    for call in calls(size, rows, columns):
        with recorded(target) as launches:
            call.run()
        for (name, elements, flops), launch in zip(call.launches, launches, strict=True):
            result.append(Work(name, launch, elements * DTYPE.itemsize, flops))
    return result


def table_rows(targets: Iterable[str], sizes: Iterable[str]) -> Iterator[Row]:
    """Compiles, and yields the lines of the table."""
    for target in targets:
        for size in sizes:
            for rows, columns in SIZES[size].shapes:
                for name, launch, moved, flops in works(target, SIZES[size], rows, columns):
                    usage = resources(compile_launch(launch, target))
                    shape = f"{size} {rows}x{columns}"
                    yield Row(name, target, shape, usage, moved, flops, roofline(moved, flops, target))


def main() -> None:
    """Prints the table."""
    args = parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
    console = Console()
    table = Table()
    for column in ("kernel", "target", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("registers", "spilled B", "shared B", "matrix", "moved MB", "GFLOP", "roofline us"):
        table.add_column(column, justify="right", no_wrap=True)
    with console.status("compiling") as status:
        for row in table_rows(args.targets, args.sizes):
            status.update(f"compiled {row.kernel} for {row.target}")
            registers, spilled, shared, has_mma = row.usage
            numbers = f"{row.moved / 1e6:.2f}", f"{row.flops / 1e9:.2f}", f"{row.seconds * 1e6:.2f}"
            described = row.kernel, row.target, row.shape, str(registers), str(spilled), str(shared)
            table.add_row(*described, "yes" if has_mma else "no", *numbers)
    # In a file or a pipe, rich takes a width of 80, and would cut the numbers off.
    console.width = max(console.width, 140)
    console.print(table)


if __name__ == "__main__":
    main()
