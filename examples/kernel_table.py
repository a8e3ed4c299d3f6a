"""Compiles every kernel for GPUs that need not be there, and prints what each takes and the least time it can take.

    python examples/kernel_table.py
    python examples/kernel_table.py --targets sm_90 gfx942 --sizes 7B

Needs ``pip install "slcompile[examples]"`` and Triton, no GPU. About a minute a target.

Shapes are the paper's attention and MLP projections, in bfloat16 with the stratified support: 1B with rank 512 and
density 0.03, 7B with rank 1024 and density 0.05. Gradients are those of 8192 tokens, the factored matmuls have 16.

Bytes count each operand once, as if caches were perfect. FLOPs are those of products, not of the hash that finds the
non-zeros. The time is the larger of bytes / bandwidth and FLOPs / peak, both as the vendors state them:

    sm_80   A100 SXM 80 GB   312 TFLOP/s dense bfloat16   2.04 TB/s
    sm_90   H100 SXM         989 TFLOP/s                  3.35 TB/s
    gfx942  MI300X          1307 TFLOP/s                  5.30 TB/s
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slcompile.kernels import compose, linear_factored, project, siblings, support, weight_grads
from slcompile.kernels.build import TARGETS, Resources, compile_for, resources, signature_of
from slcompile.ops.support import groups_per_row

DTYPE = torch.bfloat16
TRAINING_TOKENS = 8192
DECODING_TOKENS = 16
SCALE = 0.5
PEAK = {"sm_80": (312e12, 2.04e12), "sm_90": (989e12, 3.35e12), "gfx942": (1307e12, 5.30e12)}
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


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


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
    parser.add_argument("--targets", nargs="+", type=one_of(TARGETS), default=["sm_80", "sm_90"], help=names(TARGETS))
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


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Within it, launches are written to the list instead of done, with the tiles of ``target``."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
                every = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **constants}
                found.append(Launch(self.kernel, every, {"num_warps": num_warps, "num_stages": num_stages}))

            return record

    replaced = {"launchable": Recorder, "device_class": lambda device: target}
    with (
        mock.patch.multiple(compose, **replaced),
        mock.patch.multiple(weight_grads, **replaced),
        mock.patch.multiple(siblings, **replaced),
    ):
        yield found


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def works(target: str, size: Size, rows: int, columns: int) -> list[Work]:
    """Every kernel, at one shape."""
    rank, groups, many, few = size.rank, groups_per_row(columns, size.density), TRAINING_TOKENS, DECODING_TOKENS
    B, A, values, seed = empty(rows, rank), empty(rank, columns), empty(rows, groups), empty(1, dtype=torch.int64)
    dense, factors, non_zeros = rows * columns, rank * (rows + columns), rows * groups
    left, right, x, grad = empty(many, rows), empty(many, columns), empty(few, columns), empty(few, rows)
    hidden = empty(few, rank)
    splits = triton.cdiv(columns, siblings.SPLIT)
    back_splits = triton.cdiv(rows, siblings.SPLIT)

    # What is called, and for each launch that it makes: name, elements moved (of two bytes each), and FLOPs.
    calls: list[tuple[Callable[[], Any], list[tuple[str, int, int]]]] = [
        (
            lambda: compose.compose(B, A, values, seed, SCALE),
            [("compose", factors + non_zeros + dense, 2 * dense * rank)],
        ),
        (
            lambda: weight_grads.weight_grads(left, right, B, A, values, seed, SCALE),
            [("weight_grads", many * (rows + columns) + dense + non_zeros, 2 * many * dense)],
        ),
        (
            lambda: weight_grads.values_grad(left, right, values, seed),
            [("values_grad", many * (rows + columns) + non_zeros, 2 * many * dense)],
        ),
        (
            lambda: project.project(x, [A], [SCALE]),
            [
                ("project", few * columns + rank * columns + 2 * splits * few * rank, 2 * few * rank * columns),
                ("sum_splits", (2 * splits + 1) * few * rank, 0),
            ],
        ),
        (
            lambda: linear_factored.linear_factored(x, [hidden], [B], [values], [seed]),
            [
                (
                    "linear_factored",
                    few * (columns + rank + rows) + rank * rows + non_zeros,
                    2 * few * (rank * rows + non_zeros),
                )
            ],
        ),
        (
            lambda: linear_factored.linear_factored(grad, [hidden], [A], [values], [seed], transposed=True),
            [
                (
                    "linear_factored, transposed",
                    few * (rows + rank) + rank * columns + non_zeros + 2 * back_splits * few * columns,
                    2 * few * (rank * columns + non_zeros),
                ),
                ("sum_splits, transposed", (2 * back_splits + 1) * few * columns, 0),
            ],
        ),
    ]
    result = []
    for call, described in calls:
        with recorded(target) as launches:
            call()
        for (name, elements, flops), launch in zip(described, launches, strict=True):
            result.append(Work(name, launch, elements * DTYPE.itemsize, flops))

    kernel = support.stratified_columns_kernel
    arguments = (seed, empty(non_zeros, dtype=torch.int64), 0, non_zeros, columns, groups, 1, support.BLOCK)
    launch = Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=True)), {})
    return [*result, Work("stratified_columns", launch, non_zeros * torch.int64.itemsize, 0)]


def table_rows(targets: Iterable[str], sizes: Iterable[str]) -> Iterator[Row]:
    """Compiles, and yields the lines of the table."""
    for target in targets:
        for size in sizes:
            for rows, columns in SIZES[size].shapes:
                for name, launch, moved, flops in works(target, SIZES[size], rows, columns):
                    compiled = compile_for(
                        launch.kernel, *signature_of(launch.kernel, launch.arguments), target, **launch.options
                    )
                    peak, bandwidth = PEAK[target]
                    shape = f"{size} {rows}x{columns}"
                    seconds = max(moved / bandwidth, flops / peak)
                    yield Row(name, target, shape, resources(compiled), moved, flops, seconds)


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
