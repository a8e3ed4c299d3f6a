"""The inputs that weights are multiplied with, as second moments: collected while the model runs.

The model runs in eager mode, and the products that ATen computes are watched. Whatever a model spells, it is ``mm``,
``addmm``, ``bmm`` and a few more there. An operand is a weight's where it shares the weight's memory, or that of a
cast, relaid or gathered copy; which entries it has, follows from its strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.models import arguments_for
from slcompile.torch_private import Watching

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
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")
_COPIES = ("clone", "_to_copy")
_GATHERS = ("index", "index_select")


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model: with a mapping's items by name, with those of a tuple or a list by position, or with one value."""
    batch = arguments_for(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def input_moments(
    model: nn.Module, weights: Iterable[tuple[nn.Parameter, int]], batches: Iterable[Any]
) -> dict[int, Tensor]:
    """Runs a model on batches and adds up ``x x^T`` over the inputs ``x`` of each weight.

    Args:
        model: In the mode in which it is to run; left as it is but for what its forward changes.
        weights: Each with the dimension that its matmuls contract. A product that contracts the other one adds nothing.
        batches: As ``call`` takes them.

    Returns:
        By the id of the weight, [inputs, inputs] or, of a stack, [matrices, inputs, inputs], float32. A weight that no
        product reads is missing.
    """
    reads = _Reads(weights)
    for batch in batches:
        with Watching(reads.see):
            call(model, batch)
        reads.forget_copies()
    return reads.moments


class _Reads:
    """What ``Watching`` calls: knows which memory is a weight's."""

    def __init__(self, weights: Iterable[tuple[nn.Parameter, int]]) -> None:
        self.moments: dict[int, Tensor] = {}
        self._weights = {id(weight): (weight.detach(), input_dim) for weight, input_dim in weights}
        self._own = {_memory(weight): key for key, (weight, _) in self._weights.items()}
        # Of copies: the weight, which of its entries the copy's memory holds, and the copy, which keeps that memory.
        self._copies: dict[int, tuple[int, Tensor, Tensor]] = {}

    def forget_copies(self) -> None:
        self._copies.clear()

    def see(self, name: str, args: Sequence[Any], result: Any) -> None:
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

    def _key(self, tensor: Tensor) -> int | None:
        memory = _memory(tensor)
        return self._copies[memory][0] if memory in self._copies else self._own.get(memory)

    def _entries(self, view: Tensor) -> Tensor:
        """Returns for each entry of a view the flat position in the weight, int64."""
        memory = _memory(view)
        if memory in self._copies:
            held = self._copies[memory][1]
            return held.as_strided(view.shape, view.stride(), view.storage_offset())
        first = self._weights[self._own[memory]][0].storage_offset()
        position = torch.tensor(view.storage_offset() - first, device=view.device)
        for size, stride in zip(view.shape, view.stride(), strict=True):
            position = position.unsqueeze(-1) + torch.arange(size, device=view.device) * stride
        return position

    def _copied(self, name: str, args: Sequence[Any], result: Tensor) -> None:
        key, entries = self._key(args[0]), self._entries(args[0])
        if _memory(result) == _memory(args[0]) or key is None:
            return  # a cast to the dtype that it has
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
            self._add(key, self._entries(view[:, :1])[:, 0], x)
            return
        entries = self._entries(view[:, :, :1])[:, :, 0]  # [matrices, inputs]
        if groups is not None:  # of tokens, one for each matrix, by their ends
            for own, tokens in zip(entries, torch.tensor_split(x, groups[:-1].cpu().long()), strict=False):
                self._add(key, own, tokens)
            return
        first, which = entries[:, 0].unique(return_inverse=True)
        for index in range(len(first)):
            same = which == index
            self._add(key, entries[same][0], x[same].flatten(0, 1))

    def _add(self, key: int, entries: Tensor, x: Tensor) -> None:
        """Adds the moment of x [tokens, inputs]; ``entries`` are those of the weight that one output reads."""
        weight, input_dim = self._weights[key]
        rows, columns = weight.shape[-2:]
        inputs = weight.shape[-2:][input_dim]
        matrix, place = entries // (rows * columns), entries % (rows * columns)
        index = place % columns if input_dim == 1 else place // columns
        across = place // columns if input_dim == 1 else place % columns
        if bool((across != across[0]).any()) or bool((matrix != matrix[0]).any()):
            return  # it contracts the other dimension
        if key not in self.moments:
            shape = (*weight.shape[:-2], inputs, inputs)
            self.moments[key] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        moment = self.moments[key] if weight.dim() == 2 else self.moments[key][matrix[0]]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            moment.index_put_((index.unsqueeze(1), index), x.t() @ x, accumulate=True)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
