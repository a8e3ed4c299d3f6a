"""Finds the weights that matmuls and convolutions read, whatever the Python spelling was."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.cost.matmul import DTYPES
from slcompile.ops import WEIGHT_OPS
from slcompile.passes.graph import arguments, op_name

# Which operands of a matmul are matrices: positions and keyword names. Names are those of op_name, so that one
# table serves ATen graphs and the graphs of Dynamo, torch.export and symbolic_trace.
MATMULS: dict[str, tuple[int | str, ...]] = {
    "mm": (0, 1, "input", "self", "mat2"),
    "bmm": (0, 1, "input", "self", "mat2"),
    "matmul": (0, 1, "input", "self", "other", "tensor1", "tensor2"),
    "linear": (0, 1, "input", "weight"),
    "addmm": (1, 2, "mat1", "mat2"),
    "baddbmm": (1, 2, "batch1", "batch2"),
    "mv": (0, "input", "self"),
    "addmv": (1, "mat"),
    "einsum": (1, 2, "operands"),
    "grouped_mm": (0, 1, "input", "self", "mat2", "mat_b"),
    "_grouped_mm": (0, 1, "input", "self", "mat2", "mat_b"),
    "grouped_mm_fallback": (1, "weight"),  # an op of transformers, where torch's own cannot be compiled
}
# Their weight is a matrix [out, in * kernel] that multiplies every patch of the input. By name: the position of the
# weight, of the groups, and of what says that it is transposed.
CONVOLUTIONS: dict[str, tuple[int, int, int | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), (1, 6, None)),
    **dict.fromkeys(("convolution", "_convolution"), (1, 8, 6)),
    "convolution_backward": (2, 9, 7),
}
_BACKWARD = "convolution_backward"
TRANSPOSED, GROUPED = "a transposed convolution", "a convolution of {} groups"
"""What reads a weight that stays dense."""
# What ATen computes them with: the result has rows or columns of the one operand and of the other.
_PRODUCTS = frozenset("addmm addmv baddbmm bmm _grouped_mm grouped_mm_fallback mm mv".split())
# What shows the same weight in another shape, layout or dtype. Slices too: a packed q/k/v is one weight whose parts
# go to several matmuls. Names as above, with dtype methods of Tensor.
VIEWS = frozenset(
    "alias as_strided bfloat16 broadcast_to chunk clone contiguous convert_element_type detach double expand flatten "
    "float getitem half movedim mT narrow permute reshape select slice split split_with_sizes squeeze swapaxes "
    "swapdims t T _to_copy to transpose type_as unbind unflatten unsafe_chunk unsafe_split _unsafe_view unsqueeze "
    "view".split()
)
# What takes whole matrices from a stack of them, such as each token's expert.
_GATHERS = frozenset("getitem index index_select".split())
_SWAPS = frozenset("mT permute swapaxes swapdims t T transpose".split())
_COPIES = frozenset("clone contiguous _to_copy to".split())
# What reads a weight's description and none of its numbers.
_METADATA = frozenset("device dim dtype ndim numel shape size stride".split())


@dataclass(frozen=True)
class MatmulRead:
    """A matmul, or a convolution, that reads a weight, in a graph with shapes.

    Attributes:
        node: Its name.
        origin: Name of the node that it was traced from; its own, where it was not.
        stack_trace: Where the model's code calls for it.
        tokens: Rows of the other operand, that is vectors multiplied with the weight; maybe symbolic. Of a
            convolution, its patches.
        flops: Multiplications and additions, for the sizes that were captured.
        backward: Whether it is part of the backward pass.
    """

    node: str
    origin: str
    stack_trace: str
    tokens: int | torch.SymInt
    flops: int
    backward: bool


@dataclass
class WeightUse:
    """How a graph uses one weight.

    Attributes:
        matmuls: Ops that multiply with it, directly or through views and casts; convolutions are among them.
        others: Names of the ops that read it otherwise; if there are any, the weight must stay dense.
        input_dim: Dimension of the stored matrix that the first matmul contracts.
        stacked: Whether the weight is three-dimensional, and all matmuls read it as a stack of matrices.
        convolved: Whether it is a convolution's, [out, in, *kernel], and nothing else multiplies with it.
        composed: Whether it is itself an operand of a weight op: a factor, not a dense weight.
        without_grad: Whether everything that reads it runs under ``torch.no_grad()`` (seen by the capture).
        reads: The matmuls, where the graph has shapes.
    """

    matmuls: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    input_dim: int = 1
    stacked: bool = False
    convolved: bool = False
    composed: bool = False
    without_grad: bool = False
    reads: list[MatmulRead] = field(default_factory=list)

    def add(self, other: WeightUse) -> None:
        """Adds what another graph does with the same weight."""
        if not self.matmuls:
            self.input_dim, self.stacked, self.convolved = other.input_dim, other.stacked, other.convolved
        elif other.matmuls:
            self.stacked &= other.stacked
            if self.convolved != other.convolved:
                self.others += self.matmuls if self.convolved else other.matmuls
        self.matmuls += other.matmuls
        self.reads += other.reads
        self.others += other.others
        self.composed |= other.composed
        self.without_grad &= other.without_grad


def find_matmuls(weight: fx.Node) -> WeightUse:
    """Follows a weight through views, transposes, expands, slices and dtype casts to everything that reads it.

    Args:
        weight: The node (placeholder, get_attr) that stands for the stored weight.
    """
    use = WeightUse()
    _follow(weight, weight, False, use, set())
    return use


def _follow(weight: fx.Node, node: fx.Node, swapped: bool, use: WeightUse, seen: set[fx.Node]) -> None:
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        name = _called(user)
        if user.target in WEIGHT_OPS:
            use.composed = True
        elif name in MATMULS and _is_matrix_operand(user, node, MATMULS[name]):
            stacked = _is_stack(weight, node)
            if use.convolved:
                use.others.append(name)
                continue
            if not use.matmuls:
                use.input_dim, use.stacked = _contracted_dim(weight, user, node, swapped), stacked
            use.stacked &= stacked
            use.matmuls.append(name)
            if name in _PRODUCTS and isinstance(user.meta.get("val"), Tensor) and node.meta["val"].dim() >= 2:
                use.reads.append(_read(user, node))
        elif isinstance(made := user.meta.get("val"), Tensor) and made.dtype not in DTYPES and name in VIEWS:
            use.others.append(f"{name} {made.dtype}".replace("torch.", ""))
        elif name in CONVOLUTIONS:
            _note_convolution(weight, user, node, name, use)
        elif name == "as_strided" and not _lies_row_by_row(weight):
            use.others.append(name)  # a composed weight has other strides
        elif name in VIEWS and user.args[:1] == (node,) and (user.all_input_nodes == [node] or name == "type_as"):
            # In-place and out= variants have other names; another tensor that it reads must be for its dtype alone.
            _follow(weight, user, swapped ^ _swaps(user, name), use, seen)
        elif name in _GATHERS and _gathers_matrices(weight, user, node, name):
            _follow(weight, user, swapped, use, seen)
        elif name not in _METADATA and not (name == "type_as" and user.args[0] is not node):
            use.others.append(name)


def _lies_row_by_row(weight: fx.Node) -> bool:
    stored = weight.meta.get("val")
    return isinstance(stored, Tensor) and stored.is_contiguous() and stored.storage_offset() == 0


def _note_convolution(weight: fx.Node, user: fx.Node, node: fx.Node, name: str, use: WeightUse) -> None:
    """Adds a convolution to what multiplies with a weight, or to the others where it is no matmul over patches."""
    if why := _why_no_matmul(weight, user, node, name):
        use.others.append(why)
    elif use.matmuls and not use.convolved:
        use.others.append(name)
    else:
        use.convolved = True
        if name == _BACKWARD:
            grad, *_, (makes_input_grad, *_) = arguments(user)
            result = grad.meta.get("val") if makes_input_grad else None
        else:
            use.matmuls.append(name)
            result = user.meta.get("val")
        if isinstance(result, Tensor):
            use.reads.append(_read_of(user, result, result.shape[1], node.meta["val"][0].numel()))


def _why_no_matmul(weight: fx.Node, user: fx.Node, node: fx.Node, name: str) -> str:
    """Says what a convolution is that does not multiply every patch with the matrix of a weight; empty if it does."""
    position, groups_at, transposed_at = CONVOLUTIONS[name]
    given, operands = arguments(user), [*user.args, *user.kwargs.values()]
    operand = given[position] if position < len(given) else user.kwargs.get("weight")
    if operand is not node or operands.count(node) > 1 or not _is_whole(weight, node):
        return name
    groups = given[groups_at] if groups_at < len(given) else user.kwargs.get("groups", 1)
    if transposed_at is not None and given[transposed_at]:
        return TRANSPOSED
    return "" if groups == 1 else GROUPED.format(groups)


def _is_whole(weight: fx.Node, node: fx.Node) -> bool:
    """Says whether a node is a whole weight [out, in, *kernel], as it is stored or of a composed matrix."""
    stored, used = weight.meta.get("val"), node.meta.get("val")
    if not isinstance(stored, Tensor) or not isinstance(used, Tensor):
        return node is weight
    if _relaid(node) or used.numel() != stored.numel():
        return False
    if weight.target in WEIGHT_OPS:
        return used.shape[0] == stored.shape[0] and used.is_contiguous()
    return used.dim() in (3, 4, 5) and used.shape == stored.shape and used.stride() == stored.stride()


def _read(user: fx.Node, node: fx.Node) -> MatmulRead:
    used = node.meta["val"]
    is_left = _is_left(user, node)
    inner, outer = used.shape[-1 if is_left else -2], used.shape[-2 if is_left else -1]
    return _read_of(user, user.meta["val"], outer, inner)


def _read_of(user: fx.Node, result: Tensor, outer: int, inner: int) -> MatmulRead:
    return MatmulRead(
        user.name,
        (torch_private.traced_from(user) or [user.name])[-1],
        user.meta.get("stack_trace") or "",
        result.numel() // outer,
        2 * torch_private.size_hint(result.numel()) * torch_private.size_hint(inner),
        torch_private.in_backward_pass(user),
    )


def _called(user: fx.Node) -> str:
    """Returns what a node calls; the attribute's name for ``weight.T``."""
    return str(user.args[1]) if user.op == "call_function" and user.target is getattr else op_name(user)


def _swaps(user: fx.Node, name: str) -> bool:
    """Returns whether a view exchanges rows and columns."""
    if name != "permute":
        return name in _SWAPS
    dims = user.args[1] if isinstance(user.args[1], (list, tuple)) else user.args[1:]
    return list(dims) in ([1, 0], [-1, -2], [1, -2], [-1, 0])


def _is_matrix_operand(user: fx.Node, node: fx.Node, slots: tuple[int | str, ...]) -> bool:
    operands: list[object] = []
    for slot in slots:
        found = user.kwargs.get(slot) if isinstance(slot, str) else user.args[slot] if slot < len(user.args) else None
        operands += found if isinstance(found, (list, tuple)) else [found]
    every_read = [*user.args, *user.kwargs.values()]
    reads = sum(arg is node or (isinstance(arg, (list, tuple)) and node in arg) for arg in every_read)
    return reads > 0 and sum(each is node for each in operands) >= reads


def _contracted_dim(weight: fx.Node, user: fx.Node, node: fx.Node, swapped: bool) -> int:
    """Returns which dimension of the stored weight the matmul sums over.

    With shapes at hand (ATen) the stride of the contracted dimension tells; else transposes are counted.
    """
    name = op_name(user)
    if name == "einsum":
        return _einsum_dim(user, node) ^ swapped
    dim = -1 if _is_left(user, node) or name == "linear" else -2
    stored, used = weight.meta.get("val"), node.meta.get("val")
    if isinstance(used, Tensor) and isinstance(stored, Tensor) and stored.dim() in (2, 3) and used.dim() >= 2:
        row_stride, column_stride = stored.stride()[-2:]
        if used.stride(dim) in (row_stride, column_stride) and row_stride != column_stride and not _relaid(node):
            return 1 if used.stride(dim) == column_stride else 0
    return (1 if dim == -1 else 0) ^ swapped


def _is_stack(weight: fx.Node, node: fx.Node) -> bool:
    """Says whether a 3-D weight reaches a matmul as whole matrices ``weight[i]`` or their transposes."""
    stored, used = weight.meta.get("val"), node.meta.get("val")
    if not isinstance(stored, Tensor) or not isinstance(used, Tensor) or stored.dim() != 3 or used.dim() < 2:
        return False  # without shapes nobody knows
    if _relaid(node):
        return False  # strides no longer tell where a dimension comes from
    matrix = list(zip(stored.shape, stored.stride(), strict=True))[-2:]
    return list(zip(used.shape, used.stride(), strict=True))[-2:] in (matrix, matrix[::-1])


def _gathers_matrices(weight: fx.Node, user: fx.Node, node: fx.Node, name: str) -> bool:
    """Returns whether an indexing takes matrices from a three-dimensional weight, by its first dimension alone."""
    stored, seen = weight.meta.get("val"), node.meta.get("val")
    if not (isinstance(stored, Tensor) and isinstance(seen, Tensor) and stored.dim() == seen.dim() == 3):
        return False
    source, where = user.args[:2]
    by_first = where == 0 if name == "index_select" else isinstance(where, (list, tuple)) and len(where) == 1
    return source is node and bool(by_first)


def _is_left(user: fx.Node, node: fx.Node) -> bool:
    """Returns whether a matrix is the first one of a product."""
    name = op_name(user)
    return name in ("mv", "addmv") or _operand(user, name) is node


def _operand(user: fx.Node, name: str) -> object:
    """Returns the first matrix of a product, whether it is given by position or by name."""
    position = 1 if name in ("addmm", "baddbmm") else 0
    if position < len(user.args):
        return user.args[position]
    # The order matters: `input` of addmm is what it adds.
    return next(
        (user.kwargs[key] for key in ("mat1", "batch1", "tensor1", "self", "input") if key in user.kwargs), None
    )


def _einsum_dim(user: fx.Node, node: fx.Node) -> int:
    """Returns the dimension of the operand whose letter the result does not have; 1 where the equation does not say."""
    equation, *operands = user.args
    operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    term = inputs.split(",")[operands.index(node)]
    return 0 if arrow and len(term) == 2 and term[0] not in output else 1


def _relaid(node: fx.Node) -> bool:
    """Returns whether a copy with other strides than its source lies between the weight and this node."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        before, after = source.meta.get("val"), node.meta["val"]
        if op_name(node) in _COPIES and isinstance(before, Tensor) and before.stride() != after.stride():
            return True
        node = source
    return False


def is_weight(value: object) -> bool:
    """Says whether a value is a parameter that a matmul could read: the report lists no biases or norms."""
    return isinstance(value, torch.nn.Parameter) and value.dim() >= 2
