"""The kernel of compose: in Triton's interpreter against float64, compiled without a GPU, traced, on a GPU.

Run as a script, this file saves what the kernel returns for CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

# rows, columns, rank: nothing divides anything, and the last pass a tile on each axis.
SHAPES = {"smallest": (1, 1, 1), "odd": (33, 65, 17), "tiles": (131, 150, 41)}


class Case(NamedTuple):
    shape: str
    support: str
    dtype: torch.dtype
    density: float = 0.1
    transposed: bool = False
    strided: bool = False
    experts: int = 0
    result: torch.dtype | None = None
    index: torch.dtype = torch.int32
    seed: int = 3


class Operands(NamedTuple):
    B: Tensor
    A: Tensor
    values: Tensor
    support: Tensor

    def to(self, to: torch.device | torch.dtype) -> Operands:
        support = self.support.to(to) if isinstance(to, torch.device) else self.support
        return Operands(*(each.to(to) for each in self[:3]), support)


def expand(shape: str, support: str, dtype: torch.dtype, **fields: list[Any]) -> list[Case]:
    return [Case(shape, support, dtype, **{name: value}) for name, values in fields.items() for value in values]


CASES = list(
    dict.fromkeys(
        [Case(shape, support, dtype) for shape in SHAPES for support in SUPPORTS for dtype in DTYPES]
        # One non-zero a row, more than a table holds, one in each column.
        + [case for support in SUPPORTS for dtype in (torch.float32, torch.bfloat16)
           for case in expand("tiles", support, dtype, density=[1e-9, 0.03, 0.5, 1.0], transposed=[True],
                              strided=[True], experts=[1, 3])]
        + [case for support in SUPPORTS
           for case in expand("odd", support, torch.bfloat16, result=[torch.float32, torch.float16], experts=[2],
                              seed=[0, 2**24 - 1], index=[torch.int64])]
        + [Case("odd", support, torch.float16, transposed=True, strided=True, experts=2, result=torch.float32)
           for support in SUPPORTS]
    )
)  # fmt: skip


def make_operands(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(5)
    rows, columns, rank = SHAPES[case.shape]
    experts = (case.experts,) if case.experts else ()
    every_row = max(1, case.experts) * rows

    def random(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
        return torch.stack([tensor, tensor], -1)[..., 0].mT.contiguous().mT if case.strided else tensor

    if case.support == "uniform":
        support = uniform_index(case.seed, every_row, columns, case.density).to(case.index)
        values = torch.randn(len(support), generator=generator, dtype=torch.float64).to(case.dtype)
    else:
        support = torch.tensor([case.seed])
        values = random(*experts, rows, groups_per_row(columns, case.density))
    return Operands(random(*experts, rows, rank), random(*experts, rank, columns), values, support)


def run(case: Case, operands: Operands, autotune: bool = False) -> list[Tensor]:
    """The composed weight, and what is left of it where B is zero: the values at the support."""
    from slcompile.kernels.compose import compose

    _, *others = operands
    return [
        compose(B, *others, SCALE, case.result, VECTOR[case.support], transposed=case.transposed, autotune=autotune)
        for B in (operands.B, torch.zeros_like(operands.B))
    ]


def reference(operands: Operands, support: str) -> list[Tensor]:
    """The same in plain torch, in the operands' dtype."""
    B, A, values, where = operands
    if values.dim() > 1:
        values = values.flatten(end_dim=-2)
    low_rank = SCALE * (B @ A)
    positions = flat_positions(values, where, A.shape[-1], VECTOR[support]).long()
    sparse = values.new_zeros(low_rank.numel()).scatter(0, positions, values.flatten()).view(low_rank.shape)
    return [low_rank + sparse, sparse]


def assert_within_the_references_error(case: Case, found: list[Tensor]) -> None:
    operands = make_operands(case)
    (exact, _), (eager, sparse) = (reference(each, case.support) for each in (operands.to(torch.float64), operands))
    weight, without_B = found
    dtype = case.result or case.dtype
    for each in found:
        assert each.dtype == dtype
        assert each.shape == exact.shape
        assert (each.mT if case.transposed else each).is_contiguous()
    # Half a unit in the last place of the result: what rounding it once may cost.
    slack = torch.finfo(dtype).eps / 2 * float(exact.norm())
    assert float((weight - exact).norm()) <= float((eager.to(dtype) - exact).norm()) + slack
    assert torch.equal(without_B, sparse.to(dtype))
    assert int((without_B != 0).sum()) == operands.values.numel()


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
    from slcompile.kernels import compose as module

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


# rows, columns, rank, density: the paper's 1B and 7B.
PAPER = {
    "1B_qkv": (2048, 2048, 512, 0.03),
    "1B_up": (5461, 2048, 512, 0.03),
    "1B_down": (2048, 5461, 512, 0.03),
    "7B_qkv": (4096, 4096, 1024, 0.05),
    "7B_up": (11008, 4096, 1024, 0.05),
    "7B_down": (4096, 11008, 1024, 0.05),
}


def compose_on_meta(shape: tuple[int, int, int, float], support: str, dtype: torch.dtype, **options: bool) -> None:
    from slcompile.kernels.compose import compose

    rows, columns, rank, density = shape
    B, A = torch.empty(rows, rank, dtype=dtype, device="meta"), torch.empty(rank, columns, dtype=dtype, device="meta")
    groups = groups_per_row(columns, density)
    values = B.new_empty((rows * groups,) if support == "uniform" else (rows, groups))
    size, kind = (rows * groups, torch.int32) if support == "uniform" else (1, torch.int64)
    where = torch.empty(size, dtype=kind, device="meta")
    compose(B, A, values, where, SCALE, vector=VECTOR[support], **options)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_at_the_papers_shapes_without_spills(
    target: str, support: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slcompile.kernels import build
    from slcompile.kernels import compose as module

    monkeypatch.setattr(module, "device_class", lambda device: target)
    for shape in PAPER.values():
        compose_on_meta(shape, support, torch.bfloat16)
    compose_on_meta(PAPER["7B_qkv"], support, torch.bfloat16, transposed=True)
    compose_on_meta(PAPER["7B_qkv"], support, torch.float32)
    # Most shapes have the same kernel: what is compiled depends on sizes only where they are 1 or divisible by 16.
    different = {}
    for kernel, arguments, options in launches:
        signature, constants = build.signature_of(kernel, arguments)
        different[str((signature, constants))] = kernel, signature, constants, options
    assert len(different) == 5
    for kernel, signature, constants, options in different.values():
        usage = build.resources(build.compile_for(kernel, signature, constants, target, **options))
        assert usage.spilled == 0
        assert usage.shared <= build.SHARED_LIMIT[target]
        # Of float32 without TF32, only AMD has matrix instructions.
        assert usage.has_mma == (signature["p_B"] == "*bf16:16" or target == "gfx942")


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.usefixtures("tf32")
def test_float32_has_matrix_instructions_where_torch_may_use_tf32(target: str, launches: list[Launch]) -> None:
    from slcompile.kernels import build

    compose_on_meta(PAPER["7B_qkv"], "stratified", torch.float32)
    ((kernel, arguments, options),) = launches
    usage = build.resources(build.compile_for(kernel, *build.signature_of(kernel, arguments), target, **options))
    assert usage.has_mma
    assert usage.spilled == 0


def test_autotuning_has_tiles_that_do_not_spill(launches: list[Launch]) -> None:
    from slcompile.kernels import build
    from slcompile.kernels import compose as module

    tuner = module.tuned_kernel()
    assert tuner is module.tuned_kernel()
    assert tuner.fn is module.compose_kernel
    assert set(tuner.keys) <= set(tuner.fn.arg_names)
    compose_on_meta(PAPER["7B_qkv"], "stratified", torch.bfloat16)
    (launch,) = launches
    for config in tuner.configs:
        signature, constants = build.signature_of(launch.kernel, {**launch.arguments, **config.kwargs})
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        assert build.resources(build.compile_for(launch.kernel, signature, constants, "sm_90", **options)).spilled == 0


def test_every_configuration_is_one_that_triton_compiles() -> None:
    from slcompile.kernels import compose as module
    from slcompile.kernels.build import TARGETS

    assert set(module.CONFIGS) == set(TARGETS)
    for config in module.tuned_kernel().configs:
        assert config.kwargs["BLOCK_N"] * module.TABLE >= 64 * config.num_warps
        assert config.kwargs["BLOCK_K"] % module.PIECE == module.PIECE % module.SEGMENT == 0


class TestTracing:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("mode", ["fake", "symbolic"])
    @pytest.mark.parametrize("experts", [0, 2])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_make_fx(self, support: str, experts: int, mode: str, autotune: bool) -> None:
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
        from torch.fx.experimental.proxy_tensor import make_fx

        if triton.knobs.runtime.interpret:
            pytest.skip("TRITON_INTERPRET is set: there is nothing to trace in this process")
        case = Case("odd", support, torch.bfloat16, experts=experts)
        operands = make_operands(case)
        graph = make_fx(lambda operands: run(case, operands, autotune), tracing_mode=mode)(operands).graph
        assert len(graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)) == 2

    @pytest.mark.parametrize("support", SUPPORTS)
    @pytest.mark.usefixtures("target")
    def test_only_the_weight_is_written_to(self, launches: list[Launch], support: str) -> None:
        """Of what it thinks is written to, torch.compile makes copies; a result that it overlooks is lost."""
        from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

        compose_on_meta((33, 65, 17, 0.1), support, torch.bfloat16)
        (launch,) = launches
        # Triton looks at addresses, which meta tensors do not have.
        tensors = {name: torch.empty(2, dtype=each.dtype)
                   for name, each in launch.arguments.items() if isinstance(each, Tensor)}  # fmt: skip
        others = {name: each for name, each in launch.arguments.items() if name not in tensors}
        index = kernel_side_table.add_kernel(launch.kernel), kernel_side_table.add_constant_args(others)
        assert get_mutated_tensors(*index, tensors, {}) == ["p_W"]


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
