"""Each of our kernels on a device beside the vendor's product that it stands by, and its roofline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slcompile.config import VECTOR
from slcompile.cost import device_class
from slcompile.measure import _fastest
from slcompile.ops import compose, linear_factored, project, values_grad
from slcompile.ops.support import groups_per_row
from tests.testing import example

FEW = (1, 16, 64)
"""Tokens of the factored products; those of decoding."""


def seconds(run: Callable[[], object], device: torch.device, spend: float) -> float:
    """Returns the median time of a run on a GPU, caches emptied before each; on a CPU, of the fastest."""
    if device.type == "cpu":
        return _fastest(run, device, spend)
    from triton.testing import do_bench

    return float(do_bench(run, rep=max(1, int(1e3 * spend)), return_mode="median")) / 1e3


def kernel_rows(
    device: torch.device | str, size: Any, shape: tuple[int, int], tokens: int, spend: float = 0.05
) -> list[dict[str, Any]]:
    """Times our functions with one weight, and the dense products.

    Args:
        device: A GPU; on a CPU the ops that compiled code calls there are timed instead of the kernels.
        size: Rank and density; a ``Size`` of ``examples/kernel_table.py``.
        shape: Rows and columns of the weight.
        tokens: Of the dense products, of a training step.
        spend: Seconds on each.

    Returns:
        Rows with ``what``, ``support``, ``tokens``, ``us``; of our kernels also ``roofline_us``, and ``vendor_us`` of
        the product that each stands by: that which it follows, reads from, or takes the place of.
    """
    table, device = example("kernel_table"), torch.device(device)
    rows, columns = shape
    timed = functools.partial(seconds, device=device, spend=spend)

    def make(*shape: int, dtype: torch.dtype = table.DTYPE) -> Tensor:
        if dtype == torch.int64:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, device=device).to(dtype) / 8

    def product(*sizes: int) -> float:
        m, k, n = sizes
        first, second = make(m, k), make(n, k)
        return timed(lambda: first @ second.t())

    def weight_gradient() -> float:
        grad, x = make(tokens, rows), make(tokens, columns)
        return timed(lambda: grad.t() @ x)

    vendor = {
        "x W^T": product(tokens, columns, rows),
        "dy^T x": weight_gradient(),
        "B A": product(rows, size.rank, columns),
        "dW A^T": product(rows, columns, size.rank),
    }
    found: list[dict[str, Any]] = [
        {"what": name, "support": "", "tokens": tokens if name in ("x W^T", "dy^T x") else None, "us": 1e6 * each}
        for name, each in vendor.items()
    ]
    gpu = device.type != "cpu"
    for few in FEW:
        x_W, dy_W, x_A = product(few, columns, rows), product(few, rows, columns), product(few, columns, size.rank)
        beside = {"project": x_A, "linear_factored": x_W, "linear_factored, transposed": dy_W}
        for support, vector in (("stratified", 1), ("vector", VECTOR)):
            calls = (table.calls if gpu else _calls_on_cpu)(size, rows, columns, tokens=few, vector=vector, make=make)
            for call in calls:
                is_few = call.name in beside
                if (is_few and call.name == "project" and vector > 1) or (not is_few and few != FEW[0]):
                    continue  # the same work as before
                row = {"what": call.name, "support": support if call.name != "project" else ""}
                row |= {"tokens": few if is_few else None, "us": 1e6 * timed(call.run)}
                row["vendor_us"] = 1e6 * beside.get(call.name, vendor["B A" if call.name == "add" else "dy^T x"])
                if gpu:
                    target = device_class(device).name
                    parts = [
                        table.roofline(each * table.DTYPE.itemsize, flops, target) for _, each, flops in call.launches
                    ]
                    row["roofline_us"] = 1e6 * sum(parts)
                found.append(row)
    return found


def _calls_on_cpu(
    size: Any, rows: int, columns: int, *, tokens: int, vector: int, make: Callable[..., Tensor]
) -> list[Any]:
    """The same work by the ops that compiled code calls on CPUs, where composing and reading are not told apart."""
    table = example("kernel_table")
    groups = groups_per_row(columns, size.density)
    B, A, values, seed = make(rows, size.rank), make(size.rank, columns), make(rows, groups), make(1, dtype=torch.int64)
    x, grad, hidden = make(tokens, columns), make(tokens, rows), make(tokens, size.rank)
    return [
        table.Call("add", lambda: compose(B, A, values, seed, table.SCALE, None, vector), []),
        table.Call("read", lambda: values_grad(grad, x, values, seed, vector), []),
        table.Call("project", lambda: project(x, [A], [table.SCALE]), []),
        table.Call(
            "linear_factored", lambda: linear_factored(x, [hidden], [B], [values], [seed], [None], False, vector), []
        ),
        table.Call(
            "linear_factored, transposed",
            lambda: linear_factored(grad, [hidden], [A], [values], [seed], [None], True, vector),
            [],
        ),
    ]
