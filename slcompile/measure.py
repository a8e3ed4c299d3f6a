"""Measures a device's rates for ``slcompile.cost``."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slcompile.config import VECTOR
from slcompile.cost import DTYPES, Rates, default_rates, store_rates
from slcompile.ops.sparse_cpu import sparse_addmm
from slcompile.ops.support import stratified_columns
from slcompile.ops.vector_cpu import vector_addmm


def measure_rates(device: torch.device | str, seconds: float = 0.3) -> tuple[Rates, Path]:
    """Measures a device's rates and stores them for later compiles on this machine.

    Args:
        device: ``"cpu"`` (with the current number of threads) or a CUDA device.
        seconds: Spent on each of about ten measurements; the fastest run counts.

    Returns:
        The rates, and the JSON file that holds them ($SLCOMPILE_CACHE_DIR, else ~/.cache/slcompile); deleting it brings
        the defaults back.
    """
    device = torch.device(device)
    defaults = default_rates(device)
    is_cpu = device.type == "cpu"
    matmul, sparse, vector = dict(defaults.matmul), dict(defaults.sparse), dict(defaults.vector)
    support = torch.tensor([1], device=device)
    for dtype, name in DTYPES.items():
        # Tall, as activations are. A CPU may have no fast float16.
        size = 8192 if not is_cpu else 256 if dtype == torch.float16 else 1024
        tokens, rows, columns, groups = 2 * size, size, size // 2, size // 64
        x, w = torch.randn(tokens, size, device=device).to(dtype), torch.randn(size, rows, device=device).to(dtype)
        matmul[name] = 2 * tokens * size * rows / _fastest(functools.partial(torch.mm, x, w), device, seconds)
        if is_cpu:
            values, x_T = torch.randn(rows, groups).to(dtype), torch.randn(columns, tokens).to(dtype)
            factor, hidden = torch.zeros(rows, 1).to(dtype), torch.zeros(tokens, 1).to(dtype)
            run = functools.partial(sparse_addmm, factor, hidden, values, support, x_T, False)
            operations = 2 * tokens * rows * groups
            sparse[name] = operations / _fastest(run, device, seconds)
            operands = (values, support, torch.randn(tokens, columns).to(dtype), None, False, VECTOR)
            run = functools.partial(vector_addmm, factor, hidden, *operands)
            vector[name] = operations / _fastest(run, device, seconds)
    large = torch.empty(2**26 if is_cpu else 2**28, device=device)  # no cache holds it
    memory = 2 * large.nbytes / _fastest(large.clone, device, seconds)
    measured = dataclasses.replace(defaults, matmul=matmul, sparse=sparse, memory=memory, vector=vector)
    if is_cpu:
        hashed = functools.partial(stratified_columns, support, rows, columns, groups)
        measured = dataclasses.replace(measured, entries=rows * groups / _fastest(hashed, device, seconds))
    return measured, store_rates(device, measured)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of the runs that fit into the given time, after one that warms up; at least three."""
    times: list[float] = []
    run()
    while len(times) < 3 or sum(times) < seconds:
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)
