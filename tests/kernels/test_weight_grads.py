"""The kernel of weight_grads and values_grad: in Triton's interpreter against float64, compiled without a GPU, traced,
on a GPU.

Run as a script, this file saves what the kernel returns for CASES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops.support import flat_positions, groups_per_row, uniform_index

triton = pytest.importorskip("triton", reason="the kernels need triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUPPORTS = ("stratified", "vector", "uniform")
VECTOR = {"stratified": 1, "vector": 8, "uniform": 1}
SCALE = 0.75

# tokens, rows, columns, rank: nothing divides anything, and the last pass a tile on each axis.
SHAPES = {"smallest": (1, 1, 1, 1), "odd": (19, 33, 65, 17), "tiles": (41, 131, 150, 9)}


class Case(NamedTuple):
    shape: str
    support: str
    dtype: torch.dtype
    density: float = 0.1
    strided: bool = False
    parameters: torch.dtype | None = None
    index: torch.dtype = torch.int32
    seed: int = 3


class Operands(NamedTuple):
    left: Tensor
    right: Tensor
    B: Tensor
    A: Tensor
    values: Tensor
    support: Tensor

    def to(self, to: torch.device | torch.dtype) -> Operands:
        support = self.support.to(to) if isinstance(to, torch.device) else self.support
        return Operands(*(each.to(to) for each in self[:5]), support)


CASES = list(
    dict.fromkeys(
        [Case(shape, support, dtype) for shape in SHAPES for support in SUPPORTS for dtype in DTYPES]
        # One non-zero a row, more than a table holds, one in each column.
        + [Case("tiles", support, dtype, density) for support in SUPPORTS for dtype in (torch.float32, torch.bfloat16)
           for density in (1e-9, 0.03, 0.5, 1.0)]
        + [Case("tiles", support, dtype, strided=True) for support in SUPPORTS for dtype in DTYPES]
        + [Case("odd", support, torch.bfloat16, seed=seed) for support in SUPPORTS for seed in (0, 2**24 - 1)]
        + [Case("odd", "uniform", torch.bfloat16, index=torch.int64)]
        # Autocast: the matmul in low precision, the parameters in float32.
        + [Case("odd", support, dtype, parameters=torch.float32) for support in SUPPORTS
           for dtype in (torch.bfloat16, torch.float16)]
    )
)  # fmt: skip


def make_operands(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(5)
    tokens, rows, columns, rank = SHAPES[case.shape]
    parameters = case.parameters or case.dtype

    def random(*shape: int, dtype: torch.dtype = parameters) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.stack([tensor, tensor], -1)[..., 0].mT.contiguous().mT if case.strided else tensor

    if case.support == "uniform":
        support = uniform_index(case.seed, rows, columns, case.density).to(case.index)
        values = torch.randn(len(support), generator=generator, dtype=torch.float64).to(parameters)
    else:
        support, values = torch.tensor([case.seed]), random(rows, groups_per_row(columns, case.density))
    left, right = random(tokens, rows, dtype=case.dtype), random(tokens, columns, dtype=case.dtype)
    return Operands(left, right, random(rows, rank), random(rank, columns), values, support)


def run(case: Case, operands: Operands, autotune: bool = False) -> list[Tensor]:
    """The gradients of B, A and values, and the last by itself."""
    from slcompile.kernels.weight_grads import values_grad, weight_grads

    left, right, _, _, values, support = operands
    vector = VECTOR[case.support]
    alone = values_grad(left, right, values, support, vector, autotune=autotune)
    return [*weight_grads(*operands, SCALE, vector, autotune=autotune), alone]


def reference(operands: Operands, support: str) -> list[Tensor]:
    """The same in plain torch, in the operands' dtype."""
    left, right, B, A, values, where = operands
    G = left.t() @ right
    grad_values = G.flatten()[flat_positions(values, where, A.shape[1], VECTOR[support]).long()].view(values.shape)
    rounded = G.to(B.dtype)
    return [SCALE * (rounded @ A.t()), SCALE * (B.t() @ rounded), grad_values, grad_values]


def assert_within_the_references_error(case: Case, found: list[Tensor]) -> None:
    operands = make_operands(case)
    exact_grads = reference(operands.to(torch.float64), case.support)
    for name, exact, eager, ours in zip(
        ["B", "A", "values", "values"], exact_grads, reference(operands, case.support), found, strict=True
    ):
        parameter = getattr(operands, name)
        assert ours.dtype == parameter.dtype
        assert ours.shape == exact.shape == parameter.shape
        assert ours.is_contiguous()
        # Half a unit in the last place of the result: what rounding it once may cost.
        slack = torch.finfo(case.dtype).eps / 2 * float(exact.norm())
        assert float((ours - exact).norm()) <= float((eager - exact).norm()) + slack
    if case.parameters:
        # Taken from float32, so far closer than what has been through G.
        exact = exact_grads[2]
        assert float((found[2] - exact).norm()) <= SHAPES[case.shape][0] * 2**-23 * float(exact.norm())
    assert torch.equal(found[2], found[3])


def name_of(case: Case) -> str:
    return "-".join(str(each).removeprefix("torch.") for each in case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[Tensor]], case: Case) -> None:
    assert_within_the_references_error(case, interpreted[name_of(case)])


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches of the kernel are written here instead of done."""
    from slcompile.kernels import weight_grads as module

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process")
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
                every = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **constants}
                found.append(Launch(self.kernel, every, {"num_warps": num_warps, "num_stages": num_stages}))

            return record

    monkeypatch.setattr(module, "launchable", Recorder)
    return found


# rows, columns, density: the paper's 1B and 7B.
PAPER = {
    "1B_qkv": (2048, 2048, 0.03),
    "1B_up": (5461, 2048, 0.03),
    "1B_down": (2048, 5461, 0.03),
    "7B_qkv": (4096, 4096, 0.05),
    "7B_up": (11008, 4096, 0.05),
    "7B_down": (4096, 11008, 0.05),
}


def run_on_meta(shape: tuple[int, int, float], support: str, dtype: torch.dtype, tokens: int = 8192) -> None:
    """Both launchers, on meta tensors."""
    rows, columns, density = shape

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    groups = groups_per_row(columns, density)
    values, where = empty(rows, groups), empty(1, dtype=torch.int64)
    if support == "uniform":
        values, where = values.flatten(), empty(rows * groups, dtype=torch.int32)
    factors = empty(rows, 512), empty(512, columns)
    run(Case("odd", support, dtype), Operands(empty(tokens, rows), empty(tokens, columns), *factors, values, where))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_at_the_papers_shapes_without_spills(
    target: str, support: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slcompile.kernels import build
    from slcompile.kernels import weight_grads as module

    monkeypatch.setattr(module, "device_class", lambda device: target)
    for shape in PAPER.values():
        run_on_meta(shape, support, torch.bfloat16)
    run_on_meta(PAPER["7B_qkv"], support, torch.float32)
    # Most shapes have the same kernel: what is compiled depends on sizes only where they are 1 or divisible by 16.
    different = {}
    for kernel, arguments, options in launches:
        signature, constants = build.signature_of(kernel, arguments)
        different[str((signature, constants))] = kernel, signature, constants, options
    # With G stored and without.
    assert len(different) == 4 * 2
    for kernel, signature, constants, options in different.values():
        usage = build.resources(build.compile_for(kernel, signature, constants, target, **options))
        assert usage.spilled == 0
        assert usage.shared <= build.SHARED_LIMIT[target]
        # Of float32 without TF32, only AMD has matrix instructions.
        assert usage.has_mma == (signature["p_left"] == "*bf16:16" or target == "gfx942")


def test_autotuning_has_tiles_that_do_not_spill(launches: list[Launch]) -> None:
    from slcompile.kernels import build
    from slcompile.kernels import weight_grads as module

    tuner = module.tuned_kernel()
    assert tuner is module.tuned_kernel()
    assert tuner.fn is module.weight_grads_kernel
    assert set(tuner.keys) <= set(tuner.fn.arg_names)
    run_on_meta(PAPER["7B_qkv"], "stratified", torch.bfloat16)
    _, launch = launches
    for config in tuner.configs:
        signature, constants = build.signature_of(launch.kernel, {**launch.arguments, **config.kwargs})
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        assert build.resources(build.compile_for(launch.kernel, signature, constants, "sm_90", **options)).spilled == 0


def test_every_configuration_is_one_that_triton_compiles() -> None:
    from slcompile.kernels import weight_grads as module
    from slcompile.kernels.build import TARGETS

    assert set(module.CONFIGS) == set(TARGETS)
    for config in module.tuned_kernel().configs:
        assert config.kwargs["BLOCK_N"] * module.TABLE >= 64 * config.num_warps
        assert config.kwargs["BLOCK_K"] % module.PIECE == module.PIECE % module.SEGMENT == 0


class TestTracing:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("mode", ["fake", "symbolic"])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_make_fx(self, support: str, mode: str, autotune: bool) -> None:
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
        from torch.fx.experimental.proxy_tensor import make_fx

        if triton.knobs.runtime.interpret:
            pytest.skip("TRITON_INTERPRET is set: there is nothing to trace in this process")
        case = Case("odd", support, torch.bfloat16)
        operands = make_operands(case)
        graph = make_fx(lambda operands: run(case, operands, autotune), tracing_mode=mode)(operands).graph
        assert len(graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)) == 2

    @pytest.mark.parametrize("support", SUPPORTS)
    @pytest.mark.usefixtures("target")
    def test_only_results_are_written_to(self, launches: list[Launch], support: str) -> None:
        """Of what it thinks is written to, torch.compile makes copies; a result that it overlooks is lost."""
        from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

        run_on_meta((33, 65, 0.1), support, torch.bfloat16, tokens=7)
        assert len(launches) == 2
        for (kernel, arguments, _), results in zip(
            launches, (["p_grad_values"], ["p_G", "p_grad_values"]), strict=True
        ):
            # Triton looks at addresses, which meta tensors do not have.
            tensors = {name: torch.empty(2, dtype=each.dtype)
                       for name, each in arguments.items() if isinstance(each, Tensor)}  # fmt: skip
            others = {name: each for name, each in arguments.items() if name not in tensors}
            index = kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(others)
            assert sorted(get_mutated_tensors(*index, tensors, {})) == results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_error_is_within_the_references(self, case: Case, autotune: bool) -> None:
        found = run(case, make_operands(case).to(torch.device("cuda")), autotune)
        assert_within_the_references_error(case, [each.cpu() for each in found])

    @pytest.mark.parametrize("support", SUPPORTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_two_runs_are_bit_equal(self, dtype: torch.dtype, support: str) -> None:
        case = Case("tiles", support, dtype)
        operands = make_operands(case).to(torch.device("cuda"))
        assert all(map(torch.equal, run(case, operands), run(case, operands)))


if __name__ == "__main__":
    from interpreter import save_results

    save_results(lambda: {name_of(case): run(case, make_operands(case)) for case in CASES})
