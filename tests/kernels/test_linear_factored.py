"""The factored matmul's kernels: in Triton's interpreter against float64, compiled without a GPU, traced, on a GPU.

Run as a script, this file saves what the kernels return for CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# terms of x, then outputs and rank of each sibling: nothing divides anything, the last passes a block on each axis.
SHAPES = {
    "smallest": (1, [(1, 1)]),
    "one": (65, [(33, 17)]),
    "two": (129, [(33, 17), (70, 5)]),
    "three": (31, [(5, 9), (70, 20), (16, 16)]),
    "four": (33, [(17, 3), (1, 1), (40, 33), (5, 18)]),
    "five": (40, [(17, 3), (9, 4), (33, 17), (20, 1), (35, 18)]),
    "long": (1030, [(70, 150)]),
}
TOKENS = (1, 3, 16, 17, 33, 64)


class Case(NamedTuple):
    tokens: int
    shape: str
    dtype: torch.dtype
    support: str
    transposed: bool = False
    density: float = 0.1
    bias: str = "some"
    strided: bool = False


class Operands(NamedTuple):
    """x [T, terms]; for each sibling first [R, terms], second [outputs, R] (transposed views if transposed), hidden
    [T, R], values and support of S [outputs, terms] or, transposed, [terms, outputs], bias [outputs] or None."""

    x: Tensor
    firsts: list[Tensor]
    seconds: list[Tensor]
    hiddens: list[Tensor]
    values: list[Tensor]
    supports: list[Tensor]
    biases: list[Tensor | None]

    def to(self, to: torch.device | torch.dtype) -> Operands:
        def each(tensor: Any) -> Any:
            floating = tensor is not None and (tensor.is_floating_point() or isinstance(to, torch.device))
            return tensor.to(to) if floating else tensor

        return Operands(each(self.x), *([each(tensor) for tensor in tensors] for tensors in self[1:]))


WAYS = [("stratified", False), ("vector", False), ("uniform", False), ("stratified", True), ("vector", True)]
CASES = list(
    dict.fromkeys(
        [Case(tokens, "two", torch.bfloat16, *way) for tokens in TOKENS for way in WAYS]
        + [Case(tokens, "two", dtype, *way) for tokens in (1, 17, 64) for dtype in DTYPES for way in WAYS]
        + [Case(65, "one", torch.bfloat16, *way) for way in WAYS]
        + [Case(16, shape, dtype, *way) for shape in SHAPES for dtype in DTYPES[:2] for way in WAYS]
        + [Case(tokens, "one", torch.bfloat16, *way, density, bias, strided=True)
           for tokens, density, bias in [(1, 0.1, "all"), (5, 1e-9, "none"), (18, 1.0, "all"), (1, 1.0, "none")]
           for way in WAYS]
    )
)  # fmt: skip


def make_operands(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
        return torch.stack([values, values], -1)[..., 0].t().contiguous().t() if case.strided else values

    terms, siblings = SHAPES[case.shape]
    operands = Operands(random(case.tokens, terms), [], [], [], [], [], [])
    for index, (outputs, rank) in enumerate(siblings):
        rows, columns = (terms, outputs) if case.transposed else (outputs, terms)
        if case.support == "uniform":
            support = uniform_index(index, rows, columns, case.density)
            values = random(len(support))
        else:
            support = torch.tensor([index])
            values = random(rows, groups_per_row(columns, case.density))
        B, A = random(rows, rank), random(rank, columns)
        has_bias = case.bias == "all" or (case.bias == "some" and index % 2 == 1)
        per_sibling = (
            *((B.t(), A.t()) if case.transposed else (A, B)),
            random(case.tokens, rank),
            values,
            support,
            random(outputs) if has_bias else None,
        )
        for tensors, tensor in zip(operands[1:], per_sibling, strict=True):
            tensors.append(tensor)
    return operands


def run(case: Case, operands: Operands, autotune: bool = False) -> list[list[Tensor]]:
    """What the kernels return: the hiddens, the results for given hiddens, and those for its own hiddens."""
    from slcompile.kernels.linear_factored import linear_factored
    from slcompile.kernels.project import project

    x, firsts, seconds, hiddens, values, supports, biases = operands
    factors = [each.t() for each in seconds] if case.transposed else seconds

    def complete(hiddens: Sequence[Tensor]) -> list[Tensor]:
        return linear_factored(
            x, hiddens, factors, values, supports, biases, case.transposed, VECTOR[case.support],
            autotune=autotune,
        )  # fmt: skip

    projected = project(x, firsts, scales_of(firsts), autotune=autotune)
    return [projected, complete(hiddens), complete(projected)]


def scales_of(factors: Sequence[Tensor]) -> list[float]:
    return [SCALE + index for index in range(len(factors))]


def reference(case: Case, operands: Operands) -> list[list[Tensor]]:
    """The same in plain torch, in the operands' dtype."""
    x, firsts, seconds, hiddens, values, supports, biases = operands
    projected = [scale * (x @ first.t()) for scale, first in zip(scales_of(firsts), firsts, strict=True)]

    def complete(hiddens: Sequence[Tensor]) -> list[Tensor]:
        results = []
        for hidden, second, value, support, bias in zip(hiddens, seconds, values, supports, biases, strict=True):
            outputs, terms = second.shape[0], x.shape[1]
            rows, columns = (terms, outputs) if case.transposed else (outputs, terms)
            S = value.new_zeros(rows * columns)
            S = S.scatter(
                0, flat_positions(value, support, columns, VECTOR[case.support]).long(), value.flatten()
            ).view(rows, columns)
            y = hidden @ second.t() + x @ (S if case.transposed else S.t())
            results.append(y if bias is None else y + bias)
        return results

    return [projected, complete(hiddens), complete(projected)]


def assert_within_the_references_error(case: Case, operands: Operands, found: list[list[Tensor]]) -> None:
    truth, eager = reference(case, operands.to(torch.float64)), reference(case, operands)
    for exacts, eagers, ours in zip(truth, eager, found, strict=True):
        for exact, result in zip(exacts, ours, strict=True):
            assert result.dtype == case.dtype
            assert result.shape == exact.shape
            assert result.is_contiguous()
        # One norm for all siblings: of a result with a handful of elements, rounding may be good or bad by chance.
        exact, expected, result = (torch.cat([each.flatten() for each in some]) for some in (exacts, eagers, ours))
        # Half a unit in the last place of the result: what rounding it once may cost.
        slack = torch.finfo(case.dtype).eps / 2 * float(exact.norm())
        assert float((result - exact).norm()) <= float((expected - exact).norm()) + slack


def name_of(case: Case) -> str:
    return "-".join(str(each).removeprefix("torch.") for each in case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[list[Tensor]]], case: Case) -> None:
    assert_within_the_references_error(case, make_operands(case), interpreted[name_of(case)])


@pytest.fixture
def compiler() -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process")


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches of the kernels are written here instead of done."""
    from slcompile.kernels import siblings as module

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


# rows, columns, rank, groups, siblings: the paper's 1B and 7B.
PAPER = {
    "1B_qkv": (2048, 2048, 512, 61, 3),
    "1B_gate_up": (5461, 2048, 512, 61, 2),
    "1B_down": (2048, 5461, 512, 164, 1),
    "7B_qkv": (4096, 4096, 1024, 205, 3),
    "7B_gate_up": (11008, 4096, 1024, 205, 2),
    "7B_down": (4096, 11008, 1024, 550, 1),
}


def launch_all(shape: tuple[int, int, int, int, int], tokens: int, dtype: torch.dtype) -> None:
    """Projects, completes with either support, and does the same transposed, on meta tensors."""
    from slcompile.kernels.linear_factored import linear_factored
    from slcompile.kernels.project import project

    rows, columns, rank, groups, siblings = shape

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, grad = empty(tokens, columns), empty(tokens, rows)
    B, A, values = empty(rows, rank), empty(rank, columns), empty(rows, groups)
    seed, index = empty(1, dtype=torch.int64), empty(rows * groups, dtype=torch.int32)
    hidden = project(x, [A] * siblings, [SCALE] * siblings)
    linear_factored(x, hidden, [B] * siblings, [values] * siblings, [seed] * siblings)
    linear_factored(x, hidden, [B] * siblings, [values.flatten()] * siblings, [index] * siblings,
                    [empty(rows)] * siblings)  # fmt: skip
    hidden = project(grad, [B.t()] * siblings, [SCALE] * siblings)
    linear_factored(grad, hidden, [A] * siblings, [values] * siblings, [seed] * siblings, transposed=True)


@pytest.mark.parametrize(("target", "tokens", "dtype"),
                         [("sm_80", 16, torch.bfloat16), ("sm_80", 64, torch.bfloat16), ("sm_90", 1, torch.bfloat16),
                          ("sm_90", 64, torch.bfloat16), ("gfx942", 16, torch.bfloat16),
                          ("sm_90", 64, torch.float32)])  # fmt: skip
@pytest.mark.usefixtures("compiler")
def test_compiles_at_the_papers_shapes_without_spills(
    target: str, tokens: int, dtype: torch.dtype, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slcompile.kernels import build
    from slcompile.kernels import siblings as module

    monkeypatch.setattr(module, "device_class", lambda device: target)
    for shape in PAPER.values():
        launch_all(shape, tokens, dtype)
    # Most shapes have the same kernel: what is compiled depends on sizes only where they are 1 or divisible by 16.
    different = {}
    for kernel, arguments, options in launches:
        signature, constants = build.signature_of(kernel, arguments)
        different[str((kernel, signature, constants))] = kernel, signature, constants, options
    assert len({kernel.__name__ for kernel, *_ in different.values()}) == 4
    for kernel, signature, constants, options in different.values():
        usage = build.resources(build.compile_for(kernel, signature, constants, target, **options))
        assert usage.spilled == 0
        assert usage.shared <= build.SHARED_LIMIT[target]
        # NVIDIA's have no matrix instructions for float32 unless it may be rounded to TF32.
        assert usage.has_mma == (kernel is not module.sum_splits_kernel and dtype == torch.bfloat16)


@pytest.mark.parametrize("name", ["PROJECT", "FACTORED", "TRANSPOSED"])
@pytest.mark.usefixtures("compiler")
def test_autotuning_tries_tiles_that_do_not_spill(name: str, launches: list[Launch]) -> None:
    from slcompile.kernels import build, linear_factored, project

    tiled = getattr(project if name == "PROJECT" else linear_factored, name)
    kernel, tuner = tiled.kernel, tiled.tuner
    assert tuner is tiled.tuner
    assert tuner.fn is kernel
    assert set(tuner.keys) <= set(kernel.arg_names)
    launch_all(PAPER["7B_qkv"], 64, torch.bfloat16)
    arguments = next(launch.arguments for launch in launches if launch.kernel is kernel)
    for config in tuner.configs:
        signature, constants = build.signature_of(kernel, {**arguments, **config.kwargs})
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        assert build.resources(build.compile_for(kernel, signature, constants, "sm_90", **options)).spilled == 0


TRACED = [
    Case(19, "three", torch.bfloat16, "stratified"),
    Case(19, "five", torch.bfloat16, "uniform"),
    Case(1, "one", torch.float32, "stratified", transposed=True),
    Case(19, "three", torch.bfloat16, "vector", transposed=True),
]


class TestTracing:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("mode", ["fake", "symbolic"])
    @pytest.mark.parametrize("case", TRACED, ids=name_of)
    @pytest.mark.usefixtures("compiler")
    def test_make_fx(self, case: Case, mode: str, autotune: bool) -> None:
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
        from torch.fx.experimental.proxy_tensor import make_fx

        operands = make_operands(case)
        graph = make_fx(lambda operands: run(case, operands, autotune), tracing_mode=mode)(operands).graph
        launched = graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)
        launches_a_list = triton.cdiv(len(operands.firsts), 4)
        assert len(launched) == launches_a_list * (2 + 2 * (2 if case.transposed else 1))

    @pytest.mark.parametrize("siblings", [1, 2, 4])
    @pytest.mark.usefixtures("compiler", "target")
    def test_only_results_are_written_to(self, launches: list[Launch], siblings: int) -> None:
        """Of what it thinks is written to, torch.compile makes copies; of factors, that would cost all there is to
        gain, and a result that it overlooks would be lost."""
        from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

        launch_all((33, 65, 17, 6, siblings), 3, torch.bfloat16)
        assert len(launches) == 8
        for kernel, arguments, _ in launches:
            # Triton looks at addresses, which meta tensors do not have.
            tensors = {name: torch.empty(2, dtype=each.dtype)
                       for name, each in arguments.items() if isinstance(each, Tensor)}  # fmt: skip
            others = {name: each for name, each in arguments.items() if name not in tensors}
            index = kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(others)
            results = [name for name in tensors if name.startswith(("p_y_", "p_sum_"))]
            assert sorted(get_mutated_tensors(*index, tensors, {})) == (results or ["p_partial"])


def test_transposed_uniform_support_is_refused() -> None:
    from slcompile.kernels.linear_factored import linear_factored

    case = Case(3, "one", torch.float32, "uniform", transposed=True)
    x, _, seconds, hiddens, values, supports, _ = make_operands(case)
    with pytest.raises(NotImplementedError, match="uniform"):
        linear_factored(x, hiddens, [each.t() for each in seconds], values, supports, transposed=True)


def test_mixed_dtypes_are_refused() -> None:
    from slcompile.kernels.project import project

    with pytest.raises(AssertionError, match="one dtype"):
        project(torch.zeros(1, 2), [torch.zeros(3, 2, dtype=torch.bfloat16)], [1.0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_error_is_within_the_references(self, case: Case, autotune: bool) -> None:
        operands = make_operands(case).to(torch.device("cuda"))
        assert_within_the_references_error(case, operands, run(case, operands, autotune))

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_two_runs_are_bit_equal(self, case: Case) -> None:
        operands = make_operands(case).to(torch.device("cuda"))
        for first, second in zip(run(case, operands), run(case, operands), strict=True):
            assert all(map(torch.equal, first, second))


if __name__ == "__main__":
    from interpreter import save_results

    save_results(lambda: {name_of(case): run(case, make_operands(case)) for case in CASES})
