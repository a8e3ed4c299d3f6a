"""Each spelling of a matmul is found in graphs of ATen, which have shapes, and of symbolic_trace, which have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from slcompile.ops import compose
from slcompile.passes import find_matmuls
from slcompile.passes.find_matmuls import WeightUse, is_weight

LEVELS = ("aten", "symbolic")

x_TK = torch.ones(5, 8)
x_BTK = torch.ones(2, 5, 8)
bias_N = torch.ones(8)
W_NK = torch.ones(8, 8)  # square: its shape does not tell which dimension is summed over
packed_rows = torch.ones(24, 8)
packed_columns = torch.ones(8, 24)


def trace(function: Callable[..., object], level: str, *args: Tensor) -> fx.GraphModule:
    return make_fx(function)(*args) if level == "aten" else fx.symbolic_trace(function)


def weight_node(gm: fx.GraphModule) -> fx.Node:
    """Our functions take the weight as their second argument."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"][1]


def use_of(function: Callable[..., object], level: str, *args: Tensor) -> WeightUse:
    return find_matmuls(weight_node(trace(function, level, *args)))


def matmul_ops(use: WeightUse) -> list[str]:
    return use.matmuls


# name: (function, x, weight, dimension of the stored weight that is summed over)
Spelling = tuple[Callable[[Tensor, Tensor], object], Tensor, Tensor, int]
SPELLINGS: dict[str, Spelling] = {
    "linear": (lambda x, W: F.linear(x, W), x_TK, W_NK, 1),
    "linear with a bias": (lambda x, W: F.linear(x, W, bias_N), x_TK, W_NK, 1),
    "linear with a bias by keyword": (lambda x, W: F.linear(x, W, bias=bias_N), x_TK, W_NK, 1),
    "linear by keywords": (lambda x, W: F.linear(input=x, weight=W, bias=bias_N), x_TK, W_NK, 1),
    "linear of a batch": (lambda x, W: F.linear(x, W, bias_N), x_BTK, W_NK, 1),
    "linear of the transpose": (lambda x, W: F.linear(x, W.t()), x_TK, W_NK, 0),
    "x @ W": (lambda x, W: x @ W, x_TK, W_NK, 0),
    "x @ W of a batch": (lambda x, W: x @ W, x_BTK, W_NK, 0),
    "x @ W.T": (lambda x, W: x @ W.T, x_TK, W_NK, 1),
    "x @ W.mT": (lambda x, W: x @ W.mT, x_TK, W_NK, 1),
    "x @ W.t()": (lambda x, W: x @ W.t(), x_TK, W_NK, 1),
    "W @ x": (lambda x, W: W @ x.t(), x_TK, W_NK, 1),
    "W.T @ x": (lambda x, W: W.T @ x.t(), x_TK, W_NK, 0),
    "W.matmul(x)": (lambda x, W: W.matmul(x.t()), x_TK, W_NK, 1),
    "mm": (lambda x, W: torch.mm(x, W), x_TK, W_NK, 0),
    "mv": (lambda x, W: torch.mv(W, x[0]), x_TK, W_NK, 1),
    "W @ vector": (lambda x, W: W @ x[0], x_TK, W_NK, 1),
    "vector @ W": (lambda x, W: x[0] @ W, x_TK, W_NK, 0),
    "addmv": (lambda x, W: torch.addmv(bias_N, W, x[0]), x_TK, W_NK, 1),
    "addmm": (lambda x, W: torch.addmm(bias_N, x, W), x_TK, W_NK, 0),
    "addmm, weight first": (lambda x, W: torch.addmm(bias_N[:5], W, x.t()), x_TK, W_NK, 1),
    "addmm of the transpose": (lambda x, W: torch.addmm(bias_N, x, W.t()), x_TK, W_NK, 1),
    "Conv1D": (lambda x, W: torch.addmm(bias_N, x.view(-1, 8), W).view(2, 5, 8), x_BTK, W_NK, 0),
    "bmm": (lambda x, W: torch.bmm(x, W.expand(2, 8, 8)), x_BTK, W_NK, 0),
    "bmm of the transpose": (lambda x, W: torch.bmm(x, W.T.expand(2, 8, 8)), x_BTK, W_NK, 1),
    "bmm, weight first": (lambda x, W: torch.bmm(W.expand(2, 8, 8), x.transpose(1, 2)), x_BTK, W_NK, 1),
    "baddbmm": (lambda x, W: torch.baddbmm(bias_N, x, W.unsqueeze(0).expand(2, -1, -1)), x_BTK, W_NK, 0),
    "einsum of [out, in]": (lambda x, W: torch.einsum("bti,oi->bto", x, W), x_BTK, W_NK, 1),
    "einsum, weight first": (lambda x, W: torch.einsum("oi,bi->bo", W, x), x_TK, W_NK, 1),
    "einsum into heads": (lambda x, W: torch.einsum("bti,hdi->bhtd", x, W.view(2, 4, 8)), x_BTK, W_NK, 1),
    "view and permute": (lambda x, W: x @ W.reshape(8, 8).unsqueeze(0).squeeze(0).permute(1, 0), x_TK, W_NK, 1),
    "two transposes": (lambda x, W: x @ W.transpose(0, 1).transpose(0, 1), x_TK, W_NK, 0),
    "clone": (lambda x, W: x @ W.clone(), x_TK, W_NK, 0),
    "cast by method": (lambda x, W: F.linear(x.bfloat16(), W.bfloat16()), x_TK, W_NK, 1),
    "cast as Inductor writes it": (
        lambda x, W: x.bfloat16() @ torch.ops.prims.convert_element_type(W, torch.bfloat16),
        x_TK,
        W_NK,
        0,
    ),
    "cast by to()": (lambda x, W: x.bfloat16() @ W.to(torch.bfloat16), x_TK, W_NK, 0),
    "cast, then transpose": (lambda x, W: x.bfloat16() @ W.to(torch.bfloat16).T, x_TK, W_NK, 1),
    "transpose, then cast": (lambda x, W: x.bfloat16() @ W.T.to(torch.bfloat16), x_TK, W_NK, 1),
    "cast to the input's dtype": (lambda x, W: F.linear(x, W.type_as(x)), x_TK.double(), W_NK, 1),
    "slice of rows": (lambda x, W: F.linear(x, W[8:16]), x_TK, packed_rows, 1),
    "slice of columns": (lambda x, W: x @ W[:, 8:16], x_TK, packed_columns, 0),
    "narrow": (lambda x, W: F.linear(x, W.narrow(0, 8, 8)), x_TK, packed_rows, 1),
    "weight that is stored transposed": (lambda x, W: F.linear(x, W), x_TK, W_NK.t(), 1),
    "x @ W that is stored transposed": (lambda x, W: x @ W, x_TK, W_NK.t(), 0),
    "one column": (lambda x, W: x @ W, x_TK, W_NK[:, :1].contiguous(), 0),
    "one row": (lambda x, W: F.linear(x, W), x_TK, W_NK[:1], 1),
    # A copy in another layout has new strides, which say nothing of the stored weight.
    "transpose, made contiguous": (lambda x, W: x @ W.t().contiguous(), x_TK, W_NK, 1),
    "linear of the transpose, made contiguous": (lambda x, W: F.linear(x, W.t().contiguous()), x_TK, W_NK, 0),
    # By keywords, as neither operand then has a position.
    "mm by keywords": (lambda x, W: torch.mm(input=x, mat2=W), x_TK, W_NK, 0),
    "mm by keywords, weight first": (lambda x, W: torch.mm(input=W, mat2=x.t()), x_TK, W_NK, 1),
    "matmul by keywords": (lambda x, W: torch.matmul(input=x, other=W), x_TK, W_NK, 0),
    "addmm by keywords": (lambda x, W: torch.addmm(bias_N, mat1=x, mat2=W), x_TK, W_NK, 0),
    "addmm by keywords, weight first": (lambda x, W: torch.addmm(bias_N[:5], mat1=W, mat2=x.t()), x_TK, W_NK, 1),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_finds_the_matmul_and_the_dimension_it_sums_over(spelling: str, level: str) -> None:
    function, x, weight, input_dim = SPELLINGS[spelling]
    use = use_of(function, level, x, weight)
    assert len(use.matmuls) == 1
    assert use.others == []
    assert use.input_dim == input_dim
    assert not use.composed


@pytest.mark.parametrize("operands", [(x_TK, W_NK), (x_BTK, W_NK)])
def test_einsum_of_an_in_out_weight(operands: tuple[Tensor, Tensor]) -> None:
    def function(x: Tensor, W: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, W)

    assert use_of(function, "aten", *operands).input_dim == 0
    # Without shapes the equation is not read: found, and not refused.
    use = use_of(function, "symbolic", *operands)
    assert (len(use.matmuls), use.others) == (1, [])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("function", "weight", "input_dim"),
    [
        (lambda x, W: [F.linear(x, part) for part in thirds(W.chunk(3))], packed_rows, 1),
        (lambda x, W: [F.linear(x, part) for part in thirds(W.split(8))], packed_rows, 1),
        (lambda x, W: [F.linear(x, part) for part in thirds(W.view(3, 8, 8).unbind())], packed_rows, 1),
        (lambda x, W: [F.linear(x, W[begin : begin + 8]) for begin in (0, 8, 16)], packed_rows, 1),
        (lambda x, W: [x @ part for part in thirds(W.chunk(3, 1))], packed_columns, 0),
        (lambda x, W: [x @ part for part in thirds(W.split([8, 8, 8], dim=1))], packed_columns, 0),
        (lambda x, W: [x @ W, W @ x.t(), F.linear(x, W)], W_NK, 0),
    ],
    ids=["chunk", "split", "unbind", "slices", "chunk of columns", "split of columns", "three of the whole"],
)
def test_finds_every_matmul_of_a_packed_or_shared_weight(
    function: Callable[..., object], weight: Tensor, input_dim: int, level: str
) -> None:
    use = use_of(function, level, x_TK, weight)
    assert len(use.matmuls) == 3
    assert use.others == []
    assert use.input_dim == input_dim


stack = torch.ones(3, 8, 8)
x_ETK = torch.ones(3, 5, 8)
rows_of = torch.tensor([0, 2, 1, 1, 0])  # a matrix of the stack for each token


@pytest.mark.parametrize(
    ("function", "input_dim"),
    [
        (lambda x, W: torch.bmm(x_ETK, W), 0),
        (lambda x, W: torch.baddbmm(x_ETK, x_ETK, W.mT), 1),
        (lambda x, W: x_ETK @ W.transpose(1, 2), 1),
        (lambda x, W: torch.bmm(W, x_ETK.mT), 1),
        (lambda x, W: torch.einsum("etk,enk->etn", x_ETK, W), 1),
        (lambda x, W: torch.bmm(x.unsqueeze(1), W[rows_of]), 0),
        (lambda x, W: torch.bmm(x.unsqueeze(1), W.index_select(0, rows_of).mT), 1),
        (lambda x, W: [x @ part for part in W], 0),
        (lambda x, W: F.linear(x, W[1]), 1),
        (lambda x, W: torch._grouped_mm(x.bfloat16(), W.bfloat16(), offs=torch.tensor([2, 3, 5]).int()), 0),
    ],
    ids=["bmm", "baddbmm", "matmul", "first", "einsum", "index", "index_select", "unbind", "select", "grouped_mm"],
)
def test_a_stack_of_matrices(function: Callable[..., object], input_dim: int) -> None:
    use = use_of(function, "aten", x_TK, stack)
    assert (use.stacked, use.input_dim, use.others) == (True, input_dim, [])
    assert use.reads
    assert all(each.flops == 2 * 8 * 8 * each.tokens for each in use.reads)


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (lambda x, W: torch.einsum("tk,khd->thd", x, W.view(8, 3, 8)), []),
        (lambda x, W: x @ W.view(24, 8).t(), []),
        (lambda x, W: torch.bmm(x_ETK, W.transpose(0, 1).reshape(3, 8, 8)), []),
        (lambda x, W: torch.bmm(x.unsqueeze(1), W[:, torch.tensor([0, 2])].mT[rows_of]), ["index"]),
    ],
    ids=["heads", "as one matrix", "other matrices", "rows of each"],
)
def test_what_is_no_stack_of_matrices(function: Callable[..., object], others: list[str]) -> None:
    use = use_of(function, "aten", x_TK, stack)
    assert (use.stacked, use.others) == (False, others)


def thirds(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A proxy cannot be iterated."""
    return parts[0], parts[1], parts[2]


# name: (function, the ops that must be among the others at the two levels, and how many matmuls)
OTHERS: dict[str, tuple[Callable[[Tensor, Tensor], object], str, str, int]] = {
    "embedding": (lambda x, W: F.embedding(torch.tensor([0, 3]), W), "embedding", "embedding", 0),
    "embedding beside a matmul": (
        lambda x, W: F.embedding(torch.tensor([0, 3]), W) @ W.t(), "embedding", "embedding", 1),
    "product": (lambda x, W: x @ (W * 2), "mul", "mul", 0),
    "product with a mask": (lambda x, W: F.linear(x, W * (x[0] > 0)), "mul", "mul", 0),
    "penalty beside a matmul": (lambda x, W: (x @ W, W.sum()), "sum", "sum", 1),
    "norm": (lambda x, W: F.linear(x, F.normalize(W)), "linalg_vector_norm", "normalize", 0),
    "bias of addmm": (lambda x, W: torch.addmm(W[:5], x, bias_N.expand(8, 8)), "addmm", "addmm", 0),
    "bias and matrix of addmm": (lambda x, W: torch.addmm(W, W, x.t() @ x), "addmm", "addmm", 0),
    "bias of linear": (lambda x, W: F.linear(x, bias_N.expand(8, 8), W[0]), "addmm", "linear", 0),
    "bias of linear by keyword": (lambda x, W: F.linear(x, bias_N.expand(8, 8), bias=W[0]), "addmm", "linear", 0),
    "vector of mv": (lambda x, W: torch.mv(x, W[0]), "mv", "mv", 0),
    "in place": (lambda x, W: x @ W.view(8, 8).mul_(2), "mul_", "mul_", 0),
    "returned": (lambda x, W: (x @ W, W), "output", "output", 1),
    "returned transpose": (lambda x, W: W.t(), "output", "output", 0),
    "concatenation": (lambda x, W: x @ torch.cat([W, x]).t(), "cat", "cat", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_in_aten_keep_the_weight_dense(name: str) -> None:
    function, other, _, matmuls = OTHERS[name]
    use = use_of(function, "aten", x_TK, W_NK.clone())
    assert other in use.others
    assert len(use.matmuls) == matmuls


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_in_symbolic_graphs_keep_the_weight_dense(name: str) -> None:
    function, _, other, matmuls = OTHERS[name]
    use = use_of(function, "symbolic", x_TK, W_NK)
    assert other in use.others
    assert len(use.matmuls) == matmuls


def test_out_variant_and_unknown_attribute_are_other_uses() -> None:
    assert use_of(lambda x, W: torch.mul(x, 2, out=W), "symbolic").others == ["mul"]
    assert use_of(lambda x, W: x @ W.grad, "symbolic").others == ["grad"]


def test_reading_a_weights_description_is_no_use_of_it() -> None:
    for function in (
        lambda x, W: x.view(W.shape) @ W,
        lambda x, W: x.to(W.dtype) @ W,
        lambda x, W: x.type_as(W) @ W,
        lambda x, W: x.view(W.size(0), -1) @ W,
    ):
        use = use_of(function, "symbolic")
        assert (use.others, len(use.matmuls)) == ([], 1)


def test_einsum_without_shapes_reads_the_contracted_dimension_from_its_equation() -> None:
    assert use_of(lambda x, W: torch.einsum("bi,oi->bo", x, W), "symbolic").input_dim == 1
    assert use_of(lambda x, W: torch.einsum("bi, io -> bo", x, W), "symbolic").input_dim == 0
    assert use_of(lambda x, W: torch.einsum("bi,io->bo", x, W.t()), "symbolic").input_dim == 1


@pytest.mark.parametrize("level", LEVELS)
def test_both_operands_of_one_matmul_are_one_matmul(level: str) -> None:
    use = use_of(lambda x, W: W @ W, level, x_TK, W_NK)
    assert len(use.matmuls) == 1
    assert use.others == []


@pytest.mark.parametrize("level", LEVELS)
def test_unused_weight_has_no_use(level: str) -> None:
    assert use_of(lambda x, W: x + 1, level, x_TK, W_NK) == WeightUse()


@pytest.mark.parametrize("level", LEVELS)
def test_factor_is_marked_as_composed(level: str) -> None:
    seed = torch.tensor([3])
    use = use_of(lambda x, B: x @ compose(B, torch.eye(2, 8), torch.ones(8, 1), seed, 1.0).t(), level, x_TK,
                 torch.randn(8, 2))  # fmt: skip
    assert use.composed
    assert use.matmuls == []
    assert use.others == []


def test_several_nodes_of_one_weight_are_one_use() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    reads = [graph.get_attr("weight"), graph.get_attr("weight")]
    graph.output((graph.call_function(F.linear, (x, reads[0])), graph.call_function(torch.matmul, (x, reads[1]))))
    use = WeightUse()
    for read in reads:
        use.add(find_matmuls(read))
    assert matmul_ops(use) == ["linear", "matmul"]
    assert use.input_dim == 1  # of the first


def test_aten_names_the_matmuls() -> None:
    use = use_of(lambda x, W: (F.linear(x, W), F.linear(x, W, bias_N), torch.bmm(x[None], W[None])), "aten", x_TK, W_NK)
    assert matmul_ops(use) == ["mm", "addmm", "bmm"]


@pytest.mark.parametrize("level", LEVELS)
def test_analysis_changes_nothing_and_is_the_same_twice(level: str) -> None:
    gm = trace(lambda x, W: (F.linear(x, W), W.sum()), level, x_TK, W_NK)
    before, weight = str(gm.graph), weight_node(gm)
    assert find_matmuls(weight) == find_matmuls(weight)
    assert str(gm.graph) == before


def test_uses_in_two_graphs_are_added() -> None:
    first = use_of(lambda x, W: W.sum(), "aten", x_TK, W_NK)
    second = use_of(lambda x, W: x @ W, "aten", x_TK, W_NK)
    third = use_of(lambda x, W: F.linear(x, W), "aten", x_TK, W_NK)
    total = WeightUse()
    for matmul in (first, second, third):
        total.add(matmul)
    assert total.matmuls == second.matmuls + third.matmuls
    assert total.others == ["sum"]
    assert total.input_dim == 0  # of the first graph that has a matmul
    total.add(WeightUse(composed=True))
    assert total.composed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nn.Parameter(torch.ones(2, 3)), True),
        (nn.Parameter(torch.ones(2, 3, 4)), True),
        (nn.Parameter(torch.ones(3)), False),
        (torch.ones(2, 3), False),
        (None, False),
    ],
    ids=["matrix", "stack of matrices", "bias", "buffer", "nothing"],
)
def test_is_weight(value: object, expected: bool) -> None:
    assert is_weight(value) is expected


def test_as_strided_of_a_weight_shows_it_only_where_it_lies_row_by_row() -> None:
    def strided(x: Tensor, W: Tensor) -> Tensor:
        return x @ torch.as_strided(W, (8, 8), (8, 1))

    assert matmul_ops(use_of(strided, "aten", x_TK, W_NK)) == ["mm"]
    for weight in (torch.ones(8, 8).t(), torch.ones(9, 8)[1:]):
        use = find_matmuls(weight_node(make_fx(strided, tracing_mode="fake")(x_TK, weight)))
        assert (use.matmuls, use.others) == ([], ["as_strided"])
