"""What weights are multiplied with, as second moments: of their inputs, and of the gradients of their outputs.

The model runs in eager mode, forward and backward, and the products that ATen computes are watched. Whatever a model
spells, it is ``mm``, ``addmm``, ``bmm`` and a few more there. An operand is a weight's where it shares the weight's
memory, or that of a cast, relaid or gathered copy; which entries it has, follows from its strides. The forward pass
multiplies ``x W^T``, which contracts the inputs; the backward pass ``g W``, which contracts the outputs. The inputs of
a convolution are its patches, each [in * kernel]. Weights may share memory, as the parts of a packed one do: an operand
is the weight's whose entries are its first and its last; one that reaches over several is no weight's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.models import arguments_for
from slcompile.torch_private import Watching, leaves_with_paths, map_leaves

PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "mv": (0, 1),
    "addmv": (1, 2),
    "_grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}
"""Names of ATen's products, and of an op of transformers, with the positions of the matrices."""
_CONVOLUTION, _CONVOLUTION_BACKWARD = "convolution", "convolution_backward"
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")
_COPIES = ("clone", "_to_copy")
_GATHERS = ("index", "index_select")


@dataclass
class Moments:
    """What is known of the use of one weight.

    Attributes:
        inputs: Sum of ``x x^T`` over its inputs, [inputs, inputs], float32; of a stack of matrices, a stack.
            Of a convolution, the inputs are patches.
        gradients: Sum of ``g g^T`` over the gradients of its outputs, [outputs, outputs], for a random sum of the
            model's outputs in which each has the sign + or -; likewise. None where they are not to count.
        tokens: Inputs that were added up.
    """

    inputs: Tensor
    gradients: Tensor | None
    tokens: int = 0


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model: with a mapping's items by name, with those of a tuple or a list by position, or with one value."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def floating_leaves(tree: Any) -> list[Tensor]:
    """Returns the floating-point tensors in what a model returns."""
    leaves = [leaf for _, leaf in leaves_with_paths(tree)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def use_moments(
    model: nn.Module, weights: Iterable[tuple[nn.Parameter, int]], batches: Iterable[Any]
) -> dict[int, Moments]:
    """Runs a model on batches, forward and backward, and adds up the moments of each weight.

    Args:
        model: In the mode in which it is to run; left as it is but for what its forward changes.
        weights: Each with the dimension that its matmuls contract.
        batches: As ``call`` takes them.

    Returns:
        By the id of the weight. One that no product reads is missing, and the gradients are zero where none came.
    """
    weights = list(weights)
    reads = Reads(weights)
    chosen = {id(weight) for weight, _ in weights}
    eager = torch.compiler.set_stance("force_eager")  # what is compiled computes without ATen
    with _differentiable(model) as parameters, torch.enable_grad(), eager:
        sources = [parameter for parameter in parameters if id(parameter) not in chosen]
        for batch in batches:
            entries: list[Tensor] = []

            def with_gradient(each: Any, entries: list[Tensor] = entries) -> Any:
                if not isinstance(each, Tensor) or not each.is_floating_point():
                    return each
                entries.append(each.detach().requires_grad_())
                return entries[-1].clone()  # which may be written to

            batch = map_leaves(with_gradient, arguments_for(model, batch))
            torch.clear_autocast_cache()  # in which casts of weights would not be seen
            with Watching(reads.see):
                reads.backward = False
                results = [each for each in floating_leaves(call(model, batch)) if each.requires_grad]
                reads.backward = True
                if results and (sources or entries):
                    signs = [torch.empty_like(each).bernoulli_().mul_(2).sub_(1) for each in results]
                    torch.autograd.grad(results, [*sources, *entries], signs, allow_unused=True)
            reads.forget_copies()
    return {key: each for key, each in reads.moments.items() if each.tokens}


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Within, every parameter requires a gradient: those of the first layer's outputs are computed, too."""
    frozen = [each for each in model.parameters() if not each.requires_grad and each.is_floating_point()]
    for each in frozen:
        each.requires_grad_()
    try:
        yield [each for each in model.parameters() if each.requires_grad]
    finally:
        for each in frozen:
            each.requires_grad_(False)


class Reads:
    """What ``Watching`` calls: knows which memory is a weight's, and adds up the moments of its inputs."""

    def __init__(self, weights: Iterable[tuple[nn.Parameter, int]]) -> None:
        self.moments: dict[int, Moments] = {}
        self.backward = False
        self._weights = {id(weight): (weight.detach(), input_dim) for weight, input_dim in weights}
        self._own: dict[int, list[int]] = {}  # of the weights' memory: whose it is
        for key, (weight, _) in self._weights.items():
            self._own.setdefault(_memory(weight), []).append(key)
        # Of copies: the weight, which of its entries the copy's memory holds, and the copy, which keeps that memory.
        self._copies: dict[int, tuple[int, Tensor, Tensor]] = {}

    def forget_copies(self) -> None:
        """Lets go of the copies of weights that were seen, whose memory others may get."""
        self._copies.clear()

    @torch.no_grad()
    def see(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Takes note of a call of ATen."""
        if name in _COPIES or name in _GATHERS:
            if isinstance(args[0], Tensor) and self._key(args[0]) is not None:
                self._copied(name, args, result)
        elif name in PRODUCTS:
            left, right = (args[position] for position in PRODUCTS[name])
            if (key := self._key(right)) is not None:
                groups = args[2] if name in _GROUPED and len(args) > 2 else None
                self._multiplied(key, right, left, groups)
            if (key := self._key(left)) is not None and name not in _GROUPED:
                turned = right.unsqueeze(0) if right.dim() == 1 else right.mT
                self._multiplied(key, left.mT, turned, None)
        elif name == _CONVOLUTION:
            x, view, _, *settings = args
            if (key := self._key(view)) is not None:
                self._convolved(key, view, x, *settings[:3])
        elif name == _CONVOLUTION_BACKWARD:
            gradient, _, view, *_ = args
            if (key := self._key(view)) is not None:
                self._convolved(key, view, gradient)

    def _key(self, tensor: Tensor) -> int | None:
        memory = _memory(tensor)
        if memory in self._copies:
            return self._copies[memory][0]
        if memory not in self._own or not tensor.numel():
            return None
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ends = torch.tensor([tensor.storage_offset(), tensor.storage_offset() + reach])
        owns = (key for key in self._own[memory] if bool((_entries_at(self._weights[key][0], ends) >= 0).all()))
        return next(owns, None)

    def _entries(self, key: int, view: Tensor) -> Tensor:
        """Returns for each entry of a weight's view the flat position in the weight, int64."""
        memory = _memory(view)
        if memory in self._copies:
            held = self._copies[memory][1]
            return held.as_strided(view.shape, view.stride(), view.storage_offset())
        place = torch.tensor(view.storage_offset(), device=view.device)
        for size, stride in zip(view.shape, view.stride(), strict=True):
            place = place.unsqueeze(-1) + torch.arange(size, device=view.device) * stride
        return _entries_at(self._weights[key][0], place)

    def _copied(self, name: str, args: Sequence[Any], result: Tensor) -> None:
        key = self._key(args[0])
        if _memory(result) == _memory(args[0]) or key is None:
            return  # a cast to the dtype that it has
        entries = self._entries(key, args[0])
        if name in _GATHERS:
            gather = getattr(torch.ops.aten, name)
            entries = gather(entries, *args[1:])
        held = torch.empty(result.untyped_storage().nbytes() // result.element_size(), dtype=torch.int64)
        held = held.to(result.device)
        held.as_strided(result.shape, result.stride(), result.storage_offset()).copy_(entries)
        self._copies[_memory(result)] = key, held, result

    def _multiplied(self, key: int, view: Tensor, x: Tensor, groups: Tensor | None) -> None:
        """Takes note of ``x @ view``: x [.., tokens, inputs], and a weight's view [.., inputs, outputs]."""
        if view.dim() == 2:
            self._add(key, self._entries(key, view[:, :1])[:, 0], x)
            return
        entries = self._entries(key, view[:, :, :1])[:, :, 0]  # [matrices, inputs]
        if groups is not None:  # of tokens, one for each matrix, by their ends
            for own, tokens in zip(entries, torch.tensor_split(x, groups[:-1].cpu().long()), strict=False):
                self._add(key, own, tokens)
            return
        first, which = entries[:, 0].unique(return_inverse=True)
        for index in range(len(first)):
            same = which == index
            self._add(key, entries[same][0], x[same].flatten(0, 1))

    def _convolved(self, key: int, view: Tensor, x: Tensor, *settings: Sequence[int]) -> None:
        """Takes note of a convolution with a weight [out, in, *kernel]: of its input, or of its result's gradient.

        ``settings`` are stride, padding and dilation, where x is the input.
        """
        weight = self._weights[key][0]
        if view.shape != weight.shape or not torch.equal(self._entries(key, view), self._entries(key, weight)):
            return  # it is turned, or a part
        held = self._held(key, len(weight), weight[0].numel())
        moment = held.inputs if settings else held.gradients
        assert moment is not None
        with torch.autocast(x.device.type, enabled=False):
            for each in x.float():  # one by one: patches are as many times larger as a kernel has entries
                rows = patches(each, weight.shape[2:], *settings) if settings else each.flatten(1).t()
                held.tokens += len(rows) if settings else 0
                moment.addmm_(rows.t(), rows)

    def _held(self, key: int, outputs: int, inputs: int, stack: Sequence[int] = ()) -> Moments:
        """Returns the moments of a weight, zeros where it had none."""
        if key not in self.moments:
            zeros = functools.partial(self._weights[key][0].new_zeros, dtype=torch.float32)
            self.moments[key] = Moments(zeros((*stack, inputs, inputs)), zeros((*stack, outputs, outputs)))
        return self.moments[key]

    def _add(self, key: int, entries: Tensor, x: Tensor) -> None:
        """Adds the moment of x [tokens, features]; ``entries`` are those of the weight that one feature less reads."""
        weight, input_dim = self._weights[key]
        rows, columns = weight.shape[-2:]
        matrix, place = entries // (rows * columns), entries % (rows * columns)
        contracted = 1 - input_dim if self.backward else input_dim
        index, across = (place % columns, place // columns) if contracted == 1 else (place // columns, place % columns)
        if bool((across != across[0]).any()) or bool((matrix != matrix[0]).any()) or bool((entries < 0).any()):
            return  # it contracts the other dimension, or another weight's entries, too
        with torch.autocast(x.device.type, enabled=False):
            self.take(key, int(matrix[0]) if weight.dim() > 2 else None, x.float(), index)

    def take(self, key: int, matrix: int | None, x: Tensor, index: Tensor) -> None:
        """Adds up the moment of x [tokens, features], float32.

        Args:
            key: Of the weight.
            matrix: Which one of a stack; None for a weight that is none.
            x: What is multiplied with it.
            index: Which inputs (backward: outputs) of the weight the features are.
        """
        weight, input_dim = self._weights[key]
        inputs, outputs = (weight.shape[-2:][dim] for dim in (input_dim, 1 - input_dim))
        held = self._held(key, outputs, inputs, weight.shape[:-2])
        moment = held.gradients if self.backward else held.inputs
        assert moment is not None
        moment = moment if matrix is None else moment[matrix]
        held.tokens += 0 if self.backward else len(x)
        if torch.equal(index, torch.arange(len(moment), device=index.device)):
            moment.addmm_(x.t(), x)
        else:
            moment.index_put_((index.unsqueeze(1), index), x.t() @ x, accumulate=True)


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Returns what a convolution multiplies with its weight.

    Args:
        x: [in, *sizes], one input.
        kernel, stride, padding, dilation: Of each of the sizes; zeros are padded.

    Returns:
        [positions, in * kernel], in the order of the weight's entries.
    """
    x = torch.nn.functional.pad(x, [size for each in reversed(padding) for size in (each, each)])
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 1):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    count = len(kernel)
    places = range(1, count + 1)
    return x.permute(*places, 0, *range(count + 1, 2 * count + 1)).reshape(-1, len(x) * math.prod(kernel))


def _entries_at(weight: Tensor, places: Tensor) -> Tensor:
    """Returns flat positions in a weight of what lies at these places of its storage; -1 for what is no entry of it."""
    rest, entries = places - int(weight.storage_offset()), torch.zeros_like(places)
    is_entry = rest >= 0
    steps = [math.prod(weight.shape[dim + 1 :]) for dim in range(weight.dim())]
    for stride, size, step in sorted(zip(weight.stride(), weight.shape, steps, strict=True), reverse=True):
        if size > 1 and stride:
            index = rest.div(stride, rounding_mode="floor")
            is_entry &= index < size
            rest, entries = rest - index * stride, entries + index * step
    return entries.where(is_entry & (rest == 0), -1)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
