"""Measures a device's rates for ``slcompile.cost``."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slcompile.config import VECTOR
from slcompile.cost import DTYPES, Rates, default_rates, device_class, store_rates, why_no_kernels
from slcompile.cost.matmul import vector_block
from slcompile.ops import KERNEL_DTYPES
from slcompile.ops.sparse_cpu import sparse_addmm
from slcompile.ops.support import stratified_columns
from slcompile.ops.vector_cpu import vector_addmm


def measure_rates(device: torch.device | str, seconds: float = 0.3) -> tuple[Rates, Path]:
    """Measures a device's rates and stores them for later compiles on this machine.

    Args:
        device: ``"cpu"`` (with the current number of threads) or a GPU.
        seconds: Spent on each of about fifteen measurements; the fastest run counts.

    Returns:
        The rates, and the JSON file that holds them ($SLCOMPILE_CACHE_DIR, else ~/.cache/slcompile); deleting it brings
        the defaults back.

    Raises:
        ValueError: No kernel runs on the device, and it is no CPU.
    """
    device = torch.device(device)
    defaults = default_rates(device)
    time = functools.partial(_fastest, device=device, seconds=seconds)
    if device_class(device).per_thread:
        measured = _cpu(device, defaults, time)
    elif missing := why_no_kernels(device):
        raise ValueError(f"device must be one that kernels run on, or cpu, got {device}: {missing}")
    else:
        measured = _gpu(device, defaults, time)
    return measured, store_rates(device, measured)


Timer = Callable[[Callable[[], object]], float]


def _cpu(device: torch.device, defaults: Rates, time: Timer) -> Rates:
    matmul, sparse, vector = dict(defaults.matmul), dict(defaults.sparse), dict(defaults.vector)
    support = torch.tensor([1])
    for dtype, name in DTYPES.items():
        # Tall, as activations are. A CPU may have no fast float16.
        size = 256 if dtype == torch.float16 else 1024
        matmul[name] = _product_rate(device, dtype, (2 * size, size, size), time)
        tokens, rows, columns, groups = 2 * size, size, size // 2, size // 64
        values, x_T = torch.randn(rows, groups).to(dtype), torch.randn(columns, tokens).to(dtype)
        factor, hidden = torch.zeros(rows, 1).to(dtype), torch.zeros(tokens, 1).to(dtype)
        run = functools.partial(sparse_addmm, factor, hidden, values, support, x_T, False)
        operations = 2 * tokens * rows * groups
        sparse[name] = operations / time(run)
        x = torch.randn(tokens, columns).to(dtype)
        run = functools.partial(vector_addmm, factor, hidden, values, support, x, None, False, VECTOR)
        vector[name] = operations / time(run)
    hashed = functools.partial(stratified_columns, support, rows, columns, groups)
    entries = rows * groups / time(hashed)
    memory = _copy_rate(device, 2**26, time)
    return dataclasses.replace(defaults, matmul=matmul, sparse=sparse, memory=memory, entries=entries, vector=vector)


def _gpu(device: torch.device, defaults: Rates, time: Timer) -> Rates:
    from slcompile.kernels.linear_factored import linear_factored

    matmul, sparse = dict(defaults.matmul), dict(defaults.sparse)
    support = torch.tensor([1], device=device)
    tokens, rows, columns, rank, groups = 64, 8192, 4096, 16, 256
    for dtype, name in DTYPES.items():
        matmul[name] = _product_rate(device, dtype, (16384, 8192, 8192), time)
        if dtype not in KERNEL_DTYPES:
            continue
        x, hidden, B, values = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((tokens, columns), (tokens, rank), (rows, rank), (rows, groups))
        )
        # The rank is the smallest that there is, so that the non-zeros are nearly all of the work.
        run = functools.partial(linear_factored, x, [hidden], [B], [values], [support])
        sparse[name] = 2 * tokens * rows * groups / time(run)
    grad, A = (torch.randn(shape, device=device).bfloat16() for shape in ((tokens, rows), (rank, columns)))
    hidden, values = hidden.bfloat16(), values.bfloat16()
    backward = functools.partial(linear_factored, grad, [hidden], [A], [values], [support], transposed=True)
    tiled = 2 * tokens * rows * columns / time(backward) / matmul["bfloat16"]
    narrow = _product_rate(device, torch.bfloat16, (rows, 512, columns), time) / matmul["bfloat16"]
    number, launches = torch.zeros(1, device=device), 100

    def launch() -> None:
        for _ in range(launches):
            number.add_(1)

    own, gathers = _gathering(device, matmul["bfloat16"], time)
    return dataclasses.replace(
        defaults,
        matmul=matmul,
        sparse=sparse,
        memory=_copy_rate(device, 2**28, time),
        tiled=tiled,
        narrow=narrow,
        launch=time(launch) / launches,
        own=own,
        gathers=gathers,
    )


def _gathering(device: torch.device, matmul: float, time: Timer) -> tuple[float, float]:
    """Measures the vector support's kernels for many tokens: their share of ``matmul``, and bytes/s that they gather.

    The copy of x^T, which siblings share and ``slcompile.cost`` counts apart, is taken off.
    """
    from slcompile.kernels.vector_products import linear_factored, tokens_side_by_side, values_grad

    tokens, rows, columns, rank, groups = 16384, 8192, 4096, 512, 128
    shapes = ((tokens, columns), (tokens, rank), (rows, rank), (rows, groups), (tokens, rows))
    x, hidden, B, values, grad = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    support = torch.tensor([1], device=device)
    copied = time(functools.partial(tokens_side_by_side, x))
    forward = functools.partial(linear_factored, x, [hidden], [B], [values], [support], [None], False, VECTOR)
    operations = 2 * tokens * rows * (rank + groups * vector_block(VECTOR) // VECTOR)
    backward = functools.partial(values_grad, grad, x, values, support, VECTOR)
    gathered = tokens * rows * groups // VECTOR * x.element_size()
    return operations / (time(forward) - copied) / matmul, gathered / (time(backward) - copied)


def _product_rate(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], time: Timer) -> float:
    """FLOP/s of a product of [m, k] and [k, n]."""
    m, k, n = sizes
    first, second = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / time(functools.partial(torch.mm, first, second))


def _copy_rate(device: torch.device, size: int, time: Timer) -> float:
    """Bytes/s of copying so many numbers, which no cache holds."""
    large = torch.empty(size, device=device)
    return 2 * large.nbytes / time(large.clone)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Times the fastest of the runs that fit into the given time, at least three, after one that warms up."""
    times: list[float] = []
    run()
    while len(times) < 3 or sum(times) < seconds:
        times.append(seconds_of(run, device))
    return min(times)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Runs something once; returns what it took, with all that it launched on a device."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on a device; a CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
