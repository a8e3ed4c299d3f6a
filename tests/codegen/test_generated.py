"""The code that Inductor generates for an H100 around our kernels and the vendor's products, without one.

Each module is run on tensors without memory, which checks the layouts that our launches are told and that nothing is
read before it was written; see ``launches``. What the kernels take is read from what ptxas makes of them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn

from tests.codegen.__main__ import ratio
from tests.codegen.estimate import SIZES, is_unaligned, product_operands
from tests.codegen.generate import generate
from tests.codegen.launches import Call, compiled_kernels, counted, large_writes, launches, run
from tests.codegen.models import Experts, Mlp, PackedConv1D, Reference
from tests.kernels.harness import SUPPORTS, WIDE, require_compiler
from tests.testing import some_of

pytest.importorskip("triton", reason="the kernels need triton")

pytestmark = pytest.mark.slow

TOKENS = 512
OPTIONS = {"rank": 64, "density": 0.03, "lowering": "composed"}
HIDDEN, EVEN, ODD = 256, 1408, 1365  # like the paper's 2048, 5504 and 5461; Inductor aligns rows from 1024 on


@pytest.fixture(autouse=True)
def compiler() -> None:
    require_compiler()


def step(
    make: Callable[..., nn.Module] = Mlp,
    inner: int = EVEN,
    *,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> Any:
    """The modules of a step."""
    with torch.device("meta"):
        model = make(HIDDEN, inner, autocast=True) if autocast else make(HIDDEN, inner)
        model.to(dtype)
    return generate(model, [((tokens, HIDDEN), dtype)], {**OPTIONS, **(options or {})}, **how)


def calls(modules: Any) -> list[list[Call]]:
    return [launches(each) for each in modules]


def products_dtypes(calls: list[Call]) -> set[torch.dtype]:
    products = [each for each in calls if each.name.startswith("extern_kernels")]
    return {operand.dtype for each in products for operand in each.read}


def reads_unaligned(call: Call) -> bool:
    """Whether it is a product of the vendor's that reads a matrix with neither rows nor columns aligned."""
    return any(map(is_unaligned, product_operands(call)[:2]))


@pytest.mark.parametrize(
    ("inner", "support"),
    some_of(itertools.product((EVEN, ODD), SUPPORTS), [(ODD, "stratified"), (EVEN, "vector"), (ODD, "uniform")]),
)
def test_composed(inner: int, support: str) -> None:
    """Three weights: W twice, a product with it in each direction, a dense gradient and two projections of it."""
    # save="all": else what norms and activation functions make is written again in the backward pass.
    forward, backward = calls(step(inner=inner, options={"support": support, "save": "all"}))
    assert counted(forward) == {"product": 3 + 3, "add_kernel": 3}
    assert counted(backward) == {"product": 3 + 3 + 9, "add_kernel": 3, "read_kernel": 3}
    dense_forward, dense_backward = calls(step(inner=inner, backend="inductor"))
    assert (counted(dense_forward), counted(dense_backward)) == ({"product": 3}, {"product": 6})
    # No matrix of the tokens is copied for our sake.
    for ours, dense in ((forward, dense_forward), (backward, dense_backward)):
        assert large_writes(ours, TOKENS * HIDDEN) <= large_writes(dense, TOKENS * HIDDEN)
    # The vendor's products read rows or columns that begin at multiples of 16 bytes, where dense ones cannot all.
    assert not [each for each in forward + backward if reads_unaligned(each)]
    assert any(map(reads_unaligned, dense_forward + dense_backward)) == (inner == ODD)


def test_autocast_multiplies_in_low_precision() -> None:
    forward, backward = calls(step(dtype=torch.float32, autocast=True))
    assert products_dtypes(forward + backward) == {torch.bfloat16}
    added = [each.arguments for each in forward if each.name == "add_kernel"]
    assert {each["p_values"].dtype for each in added} == {torch.float32}
    assert {each["p_matrix"].dtype for each in added} == {torch.bfloat16}


@pytest.mark.parametrize("autotune", [False, True])
def test_factored(autotune: bool) -> None:
    forward, backward = calls(step(tokens=48, options={"lowering": "factored", "autotune": autotune}))
    # Gate and up share a launch; their gradients differ. S of those is spread over tiles.
    assert counted(forward)["linear_factored_kernel"] == 2
    assert counted(backward)["linear_factored_transposed_kernel"] == 3
    assert counted(backward)["read_kernel"] == 3
    assert counted(forward + backward)["add_kernel"] == 0


def test_factored_is_for_few_tokens() -> None:
    forward, backward = calls(step(options={"lowering": "factored", "support": "stratified"}))
    found = counted(forward + backward)
    assert (found["add_kernel"], found["linear_factored_kernel"], found["read_kernel"]) == (6, 0, 3)


GATHERED = {"lowering": "factored", "support": "vector", "vector": 32}


@pytest.mark.parametrize("inner", some_of([EVEN, ODD], [ODD]))
def test_factored_for_many_tokens(inner: int) -> None:
    """The vector support's: no weight is composed, no dense gradient made."""
    forward, backward = calls(step(inner=inner, options=GATHERED))
    assert counted(forward) == {"product": 3, "vector_product_kernel": 3}
    transposed = dict.fromkeys(("vector_order_kernel", "vector_blocks_kernel", "vector_product_transposed_kernel"), 3)
    assert counted(backward) == {"product": 3 + 6, "vector_values_kernel": 3, "sum_splits_kernel": 3, **transposed}
    dense_forward, dense_backward = calls(step(inner=inner, backend="inductor"))
    # The inputs of gate and up, and of down, are written transposed alone, and again for the backward pass, for which a
    # dense model saves them. A dense model adds x in its last product. Of odd gradients torch 2.11 pads the two.
    for ours, dense, copies in ((forward, dense_forward, 1), (backward, dense_backward, 2)):
        more = large_writes(ours, TOKENS * HIDDEN) - large_writes(dense, TOKENS * HIDDEN) - copies
        assert more in {0, 2 * (inner == ODD and backward is ours)}


def test_results_have_the_layout_that_the_user_was_told() -> None:
    """Within a graph, the rows of an odd product have gaps between them."""
    shape = (4, TOKENS // 4, HIDDEN)
    with torch.device("meta"):
        model = nn.Linear(HIDDEN, ODD, bias=True, dtype=torch.bfloat16)
    (module,) = generate(model, [(shape, torch.bfloat16)], {**OPTIONS, **GATHERED}, training=False)
    found, (result,) = run(module)
    assert counted(found)["vector_product_kernel"] == 1
    assert result.shape == (*shape[:2], ODD)
    assert result.is_contiguous()


def test_inference() -> None:
    """One token: gate and up are projected together, by a kernel and one that adds its partial sums up."""
    (forward,) = calls(step(tokens=1, options={"lowering": "factored"}, training=False))
    assert counted(forward) == {"project_kernel": 1, "sum_splits_kernel": 1, "linear_factored_kernel": 2, "product": 1}


def test_a_symbolic_number_of_tokens() -> None:
    modules = step(dynamic=True)
    fixed = step()
    assert [counted(each) for each in calls(modules)] == [counted(each) for each in calls(fixed)]
    assert any(not isinstance(each, tuple) for each in modules[0].inputs)  # the number is an input


def test_kept_weights_are_composed_once() -> None:
    forward, backward = calls(step(options={"keep_weights": True}))
    assert (counted(forward)["add_kernel"], counted(backward)["add_kernel"]) == (3, 0)


def test_conv1d_with_a_packed_weight() -> None:
    forward, backward = calls(step(PackedConv1D, inner=ODD))
    found = counted(forward + backward)
    assert (found["add_kernel"], found["read_kernel"]) == (4, 2)


def test_experts() -> None:
    """Each stack at once; their weights' gradients are dense, and read from where they are."""
    ours = [call for each in calls(step(Experts)) for call in each]
    found = counted(ours)
    assert (found["add_kernel"], found["read_kernel"]) == (4, 2)
    dense = [call for each in calls(step(Experts, backend="inductor")) for call in each]
    assert found["product"] == counted(dense)["product"] + 4 + 4
    # The gradient of a stack comes transposed, and is copied to be read; nothing else is.
    stack = 4 * EVEN * HIDDEN
    assert large_writes(ours, stack) <= large_writes(dense, stack) + 2


def test_plain_ops_compute_the_support_in_64_bits() -> None:
    """A group times the columns passes 2**31; Inductor computes what it knows of indices in 32 bits."""
    rows, columns, groups = 8, 262144, 13107  # such as a vocabulary's
    assert groups * columns > 2**31
    arguments = [(rows, 64), (64, columns), (rows, groups)]
    args = [*((shape, torch.bfloat16) for shape in arguments), ((1,), torch.int64)]
    # Folding constants would make tensors on the GPU.
    options = {"inductor": {"joint_graph_constant_folding": False}}
    (module,) = generate(Reference(), args, options, backend="inductor", training=False)
    assert f"{columns}*" not in module.code
    assert re.search(rf"tl\.full\(\[1\], {columns}, tl\.int64\)", module.code)


MAX_AUTOTUNE = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}


@pytest.mark.parametrize("dtype", some_of([torch.bfloat16, torch.float32], [torch.bfloat16]))
def test_max_autotune_reads_only_what_was_written(dtype: torch.dtype) -> None:
    """Inductor's own matmuls multiply what they are given as a bias by beta, zero or not: ``launches`` would raise."""
    forward, backward = calls(step(options={"inductor": MAX_AUTOTUNE}, dtype=dtype))
    names = [each.name for each in forward + backward]
    assert any(name.startswith("triton_tem") for name in names)
    assert counted(forward + backward)["product"] < 6 + 15


def test_cudagraphs_take_all_of_it() -> None:
    modules = step(options={"inductor": {"triton.cudagraphs": True}})
    assert [counted(each) for each in calls(modules)] == [counted(each) for each in calls(step())]
    for module in modules:
        assert module.code.count("def partition_") <= 1


@pytest.mark.parametrize(("size", "most"), some_of([("1B", 0.97), ("7B", 1.12)], [("1B", 0.97)]))
def test_estimated_steps(size: str, most: float) -> None:
    """An estimate by the rules of ``estimate``: it says that nothing is called that need not be, no more."""
    assert ratio(SIZES[size], 16384) <= most


def assert_kernels_fit(modules: Any, folder: Path, only_ours: bool = False) -> dict[str, Any]:
    """Asserts that no kernel of these modules spills registers; returns what ours take."""
    found: dict[str, Any] = {}
    for index, each in enumerate(modules):
        place = folder / str(index)
        place.mkdir()
        for name, ours, usage, kernel in compiled_kernels(each, place):
            if ours:
                found[name] = usage
                assert not WIDE.search(kernel.asm["ptx"]), name
            if ours or not only_ours:
                assert usage.spilled == 0, name
    return found


def test_composed_kernels_spill_nothing(tmp_path: Path) -> None:
    found = assert_kernels_fit(step(inner=ODD), tmp_path)
    assert Counter(name.rsplit("_kernel")[0] for name in found) == {"add": 3, "read": 2}
    # Triton 3.6 takes 90, with which 20 warps still run at once.
    most = 64 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 96
    assert all(usage.registers <= most for usage in found.values())


@pytest.mark.long
def test_factored_kernels_multiply_matrices(tmp_path: Path) -> None:
    found = assert_kernels_fit(step(tokens=48, options={"lowering": "factored"}), tmp_path)
    for name, usage in found.items():
        assert usage.has_mma == name.startswith(("project", "linear_factored")), name


@pytest.mark.long
def test_kernels_for_many_tokens_multiply_matrices(tmp_path: Path) -> None:
    found = assert_kernels_fit(step(inner=ODD, options=GATHERED), tmp_path)
    assert len({name.rsplit("_kernel")[0] for name in found}) == 6
    for name, usage in found.items():
        assert usage.has_mma == name.startswith(("vector_product", "vector_values", "vector_blocks")), name


@pytest.mark.long
@pytest.mark.parametrize("lowering", ["composed", "factored"])
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)]
)
@pytest.mark.parametrize("inner", [EVEN, ODD])
def test_all_kernels_spill_nothing(
    lowering: str, support: str, dtype: torch.dtype, autocast: bool, inner: int, tmp_path: Path
) -> None:
    options = {"lowering": lowering, "support": support}
    tokens = 48 if lowering == "factored" else TOKENS
    found = assert_kernels_fit(
        step(inner=inner, dtype=dtype, autocast=autocast, options=options, tokens=tokens), tmp_path
    )
    assert found


@pytest.mark.parametrize("inner", some_of([EVEN, ODD], [ODD]))
def test_lora_beside_a_frozen_base_is_products_alone(inner: int) -> None:
    """Composed: W twice, by a product that is added to W0. Factored: two thin products beside each with W0."""
    lora = {"base": "frozen", "rank": 16, "density": 0}
    forward, backward = calls(step(inner=inner, options=lora))
    assert counted(forward) == {"product": 3 + 3}
    assert counted(backward) == {"product": 3 + 3 + 9}
    forward, backward = calls(step(inner=inner, options={**lora, "lowering": "factored"}))
    assert counted(forward) == {"product": 3 * 3}
    # Of the gradients those with W0, through the rank and back, and of B and A; no dense one of a weight.
    assert counted(backward) == {"product": 3 * 3 + 3 * 2}
    dense = {(HIDDEN, inner), (inner, HIDDEN)}
    assert dense.isdisjoint(tuple(each.written[0].shape) for each in backward if each.name.startswith("extern_kernels"))
