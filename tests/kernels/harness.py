"""What the kernels' tests share: random operands, error budgets, what was launched and what that takes.

A test module that runs as a script (see ``conftest.interpreted``) uses it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slcompile.cost.devices import GPU_CLASSES
from slcompile.ops.support import groups_per_row, uniform_index

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUPPORTS = ("stratified", "vector", "uniform")
VECTOR = {"stratified": 1, "vector": 8, "uniform": 1}
SCALE = 0.75
TARGETS = [each.name for each in GPU_CLASSES]

# rows, columns, rank, density: the paper's 1B and 7B.
PAPER = {
    "1B_qkv": (2048, 2048, 512, 0.03),
    "1B_up": (5461, 2048, 512, 0.03),
    "1B_down": (2048, 5461, 512, 0.03),
    "7B_qkv": (4096, 4096, 1024, 0.05),
    "7B_up": (11008, 4096, 1024, 0.05),
    "7B_down": (4096, 11008, 1024, 0.05),
}


WIDE = re.compile(r"\b((mul|add|sub|fma)\.(rn\.)?f64|v_(mul|add|fma)_f64)")
"""Arithmetic in float64."""


class Random:
    """Random tensors that are the same in every process."""

    def __init__(self, seed: int, strided: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.strided = strided

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Of a normal distribution; with ``strided``, a matrix's columns are contiguous, not its rows."""
        tensor = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        return tensor.mT.contiguous().mT if self.strided and tensor.dim() > 1 else tensor

    def sparse(
        self, support: str, seed: int, rows: int, columns: int, density: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Values and support of a weight."""
        if support == "uniform":
            index = uniform_index(seed, rows, columns, density)
            return torch.randn(len(index), generator=self.generator, dtype=torch.float64).to(dtype), index
        return self(rows, groups_per_row(columns, density), dtype=dtype), torch.tensor([seed])


def moved(tensors: Iterable[Any], to: torch.device | torch.dtype) -> list[Any]:
    """The tensors on a device, or those of them that are floating in a dtype; other things as they are."""

    def each(value: Any) -> Any:
        if not isinstance(value, Tensor) or (isinstance(to, torch.dtype) and not value.is_floating_point()):
            return value
        return value.to(to)

    return [[each(inner) for inner in value] if isinstance(value, list) else each(value) for value in tensors]


def name_of(case: Iterable[Any]) -> str:
    """A test's name, and under which name its result is saved."""
    return "-".join(str(each).removeprefix("torch.") for each in case)


def assert_within_error(found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Asserts that a result is as near to float64's as that of eager mode in the same dtype.

    What rounding it once may cost is allowed: half a unit in the last place of ``dtype``.
    """
    slack = torch.finfo(dtype).eps / 2 * float(exact.norm())
    assert float((found - exact).norm()) <= float((eager - exact).norm()) + slack


def require_compiler() -> None:
    """Skips a test that compiles or traces, where Triton's interpreter takes the compiler's place."""
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process")


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_sparse(support: str, rows: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and support without memory."""
    if support == "uniform":
        return empty(rows * groups, dtype=dtype), empty(rows * groups, dtype=torch.int32)
    return empty(rows, groups, dtype=dtype), empty(1, dtype=torch.int64)


def different(launches: Iterable[Any]) -> list[Any]:
    """Of several launches that the same code serves, one: it depends on sizes only by what divides them."""
    from slcompile.kernels.offline import signature_of

    return list({str((each.kernel, *signature_of(each.kernel, each.arguments))): each for each in launches}.values())


def usages(launches: Iterable[Any], target: str) -> Iterator[tuple[Any, Any]]:
    """Each different launch and what it takes; asserts that it fits, spills nothing and does not compute in float64.

    A Python float comes as float64: what is not cast is computed in it, at a 64th of the speed of float32 or less.
    """
    from slcompile.kernels.offline import compile_launch, resources

    (limit,) = (each.shared for each in GPU_CLASSES if each.name == target)
    for launch in different(launches):
        compiled = compile_launch(launch, target)
        usage = resources(compiled)
        assert usage.spilled == 0, launch.kernel.__name__
        assert usage.shared <= limit, launch.kernel.__name__
        assert not WIDE.search(compiled.asm.get("ptx") or compiled.asm["amdgcn"]), launch.kernel.__name__
        yield launch, usage


def assert_autotuning_spills_nothing(tiled: Any, launches: Iterable[Any], target: str = "sm_90") -> None:
    """Asserts that each tile which a kernel is tried with keeps its registers."""
    from slcompile.kernels.offline import Launch

    tuner = tiled.tuner
    assert tuner is tiled.tuner
    assert tuner.fn is tiled.kernel
    assert set(tuner.keys) <= set(tiled.kernel.arg_names)
    launch = next(each for each in launches if each.kernel is tiled.kernel)
    tried = [
        Launch(
            launch.kernel,
            {**launch.arguments, **config.kwargs},
            {"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        for config in tuner.configs
    ]
    assert len(list(usages(tried, target))) == len(tried)


def written_to(launch: Any) -> list[str]:
    """The parameters that torch.compile thinks a launch writes to."""
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

    arguments = launch.arguments
    # Triton looks at addresses, which meta tensors do not have.
    tensors = {name: torch.empty(2, dtype=each.dtype) for name, each in arguments.items() if isinstance(each, Tensor)}
    others = {name: each for name, each in arguments.items() if name not in tensors}
    index = kernel_side_table.add_kernel(launch.kernel), kernel_side_table.add_constant_args(others)
    return sorted(get_mutated_tensors(*index, tensors, {}))


def launches_in(function: Any, operands: Any, mode: str) -> list[str]:
    """Names of the kernels that a function launches, in the graph that make_fx traces of it."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode=mode)(operands).graph
    nodes = graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    return [getattr(each, "fn", each).__name__ for each in kernels]
