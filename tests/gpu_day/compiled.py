"""Compiled steps of a model on a device, held against float64 on the CPU, in memory that was full of NaN."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import slcompile
from slcompile.health import composed_by_formula, share_of_budget
from tests.codegen.models import Mlp
from tests.testing import randomize

HIDDEN, EVEN, ODD = 256, 1408, 1365  # like the paper's 2048, 5504 and 5461
CUDAGRAPHS = {"triton.cudagraphs": True}
MAX_AUTOTUNE = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}


@dataclass(frozen=True)
class Case:
    """A step of the MLP of a LLaMA layer.

    Attributes:
        lowering, support, dtype: Of its weights.
        inner, hidden: Its widths.
        tokens: None takes 48 for a factored and 512 for a composed step.
        autocast: Whether it runs in bfloat16 by autocast, with parameters of ``dtype``.
        dynamic: Whether the number of tokens is symbolic.
        vector: Rows that share their columns; None takes the default.
        options: Of the backend, beside those.
        steps: How often it runs; CUDA graphs warm up, record and replay.
    """

    lowering: str
    support: str = "stratified"
    dtype: torch.dtype = torch.bfloat16
    inner: int = EVEN
    hidden: int = HIDDEN
    tokens: int | None = None
    autocast: bool = False
    dynamic: bool = False
    vector: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1

    def __str__(self) -> str:
        dtype = "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")
        extra = [f"{key}={value}" for key, value in self.options.items() if key != "inductor"]
        extra += [*self.options.get("inductor", {}), *["dynamic"] * self.dynamic]
        extra += [f"tokens={self.tokens}"] * (self.tokens is not None)
        extra += [f"vector={self.vector}"] * (self.vector is not None)
        return "-".join([self.lowering, self.support, dtype, f"{self.hidden}x{self.inner}", *extra])


LOWERINGS, SUPPORTS = ("composed", "factored"), ("stratified", "vector", "uniform")

CASES = [
    *(
        Case(lowering, support, dtype, inner)
        for lowering in LOWERINGS
        for support in SUPPORTS
        for dtype in (torch.bfloat16, torch.float32)
        for inner in (EVEN, ODD)
    ),
    *(
        Case(lowering, support, torch.float32, inner, autocast=True)
        for lowering in LOWERINGS
        for support in SUPPORTS
        for inner in (EVEN, ODD)
    ),
    *(
        Case(lowering, support, inner=ODD, options={"inductor": CUDAGRAPHS}, steps=4)
        for lowering in LOWERINGS
        for support in SUPPORTS
    ),
    *(
        Case(lowering, dtype=dtype, inner=inner, options={"inductor": MAX_AUTOTUNE})
        for lowering in LOWERINGS
        for dtype in (torch.bfloat16, torch.float32)
        for inner in (EVEN, ODD)
    ),
    *(Case(lowering, inner=ODD, options={"autotune": True}) for lowering in LOWERINGS),
    *(Case(lowering, inner=ODD, dynamic=True) for lowering in LOWERINGS),
    *(Case(lowering, dtype=torch.float16, inner=ODD) for lowering in LOWERINGS),
    *(Case("factored", inner=inner, tokens=1) for inner in (EVEN, ODD)),
    Case("composed", options={"keep_weights": True}),
    Case("factored", options={"save": "low_rank"}),
    *(Case("composed", support, inner=5461, hidden=2048, tokens=4096) for support in SUPPORTS),
    *(Case("factored", support, inner=5461, hidden=2048, tokens=64) for support in SUPPORTS),
    *(
        Case("factored", "vector", dtype, inner, tokens=tokens, vector=vector)
        for dtype in (torch.bfloat16, torch.float32)
        for inner in (EVEN, ODD)
        for tokens, vector in ((512, 16), (513, 64))
    ),
    Case("factored", "vector", inner=ODD, tokens=512, vector=64, dynamic=True),
    Case("factored", "vector", inner=5461, hidden=2048, tokens=4096, vector=64),
]
"""What must be right on a GPU."""


def poison(device: torch.device) -> None:
    """Fills memory that the allocator will hand out again with NaN, so that what nothing has written shows."""
    if device.type == "cpu":
        return
    # Small blocks come from segments of 2 MiB, others are split off large ones.
    held = [torch.full((2**17,), torch.nan, device=device) for _ in range(64)]
    held += [torch.full((2**size,), torch.nan, device=device) for size in (20, 22, 24, 26, 28)]
    del held


def measured(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a step, on the CPU."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    (y.double() * weights.to(y.device)).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    found = {
        "output": y,
        "gradient of x": leaf.grad,
        **{f"gradient of {name}": each for name, each in gradients.items()},
    }
    return {name: each.detach().cpu() for name, each in found.items() if each is not None}


def assert_near_float64(case: Case, device: torch.device | str, within: Callable[[Any], Any] | None = None) -> None:
    """Asserts that a compiled step is about as near to float64 as an eager one of the same dtype is.

    Args:
        case: What is compiled.
        device: Where it runs; the float64 step runs on the CPU.
        within: Wraps the compiled function; a test of this check breaks it there.

    Raises:
        AssertionError: A tensor is further away than ``slcompile.check`` allows, NaN, or missing; or a repeated step
            gives other bits.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    vector = {} if case.vector is None else {"vector": case.vector}
    config = slcompile.SLConfig(rank=case.hidden // 4, density=0.03, support=case.support, seed=3, **vector)
    model = randomize(slcompile.factorize_(Mlp(case.hidden, case.inner), config), std=0.02).to(device, case.dtype)
    tokens = case.tokens or (48 if case.lowering == "factored" else 512)
    x = torch.randn(tokens, case.hidden).to(device, case.dtype)
    weights = torch.randn(tokens, case.hidden, dtype=torch.float64)
    exact_model = composed_by_formula(copy.deepcopy(model).cpu().double())
    exact = measured(exact_model, exact_model, x.cpu().double(), weights)
    autocast = torch.autocast(device.type, torch.bfloat16) if case.autocast else contextlib.nullcontext()
    eager_model = composed_by_formula(copy.deepcopy(model))
    compiled = torch.compile(
        model, backend="sltrain", dynamic=case.dynamic, options={"lowering": case.lowering, **case.options}
    )
    run = within(compiled) if within is not None else compiled
    with autocast:
        eager = measured(eager_model, eager_model, x, weights)
        poison(device)
        runs = [measured(run, model, x, weights) for _ in range(case.steps)]
    dtype = torch.bfloat16 if case.autocast else case.dtype
    for found in runs:
        assert found.keys() == exact.keys()
        shares = {name: share_of_budget(found[name], eager[name], truth, dtype)[1] for name, truth in exact.items()}
        assert all(share <= 1 for share in shares.values()), {k: v for k, v in shares.items() if not v <= 1}
    # The first runs with CUDA graphs are not replayed, and the vendor's library may choose otherwise in them.
    for name, each in runs[-1].items():
        assert torch.equal(runs[-2 if case.steps > 1 else -1][name], each), f"{name}: a repeated step gave other bits"
