"""Replaces dense weights in a graph by weight ops over their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, fx

from slcompile.names import SUFFIX
from slcompile.ops import WEIGHT_OPS
from slcompile.passes.graph import Decision, PassReport


class WeightModule(Protocol):
    """What the passes need of a weight structure: its op, the tensors the op takes, and its other arguments.

    The op composes a matrix, or a stack of them; ``stored_shape`` is that of the weight in whose place it stands.
    """

    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight, another one than ``shape`` for a convolution's."""

    @property
    def op(self) -> Any:
        """The op that composes the weight, one of ``WEIGHT_OPS``."""

    def operands(self) -> dict[str, Tensor]:
        """Returns the tensors that the op takes, by the names they have in the module."""

    def arguments(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Returns what the op is called with, from the nodes that stand for its operands."""


def parameterize_weights(gm: fx.GraphModule, weights: Mapping[str, tuple[str, WeightModule]]) -> PassReport:
    """Replaces each weight node by ``op(*operands)``, and every read of it follows.

    Legal for any graph, because the op's result has the weight's shape and dtype; a convolution's weight is a view of
    it. A placeholder becomes one placeholder for each operand, at its place, so that the caller can pass the operands
    instead; ``meta`` of the new ones holds the operands (fake or meta tensors) as ``val``. A get_attr of
    ``path.weight`` becomes get_attrs of ``path.weight_sl.<operand>``: there the weight module must stand. Other nodes
    are left alone.

    Args:
        gm: Changed in place and recompiled.
        weights: Name of the weight's node -> (fully qualified name, its weight module).
    """
    report = PassReport()
    for node in list(gm.graph.nodes):
        if node.name not in weights:
            continue
        name, module = weights[node.name]
        assert module.op in WEIGHT_OPS, module.op
        operands = []
        for suffix, tensor in module.operands().items():
            with gm.graph.inserting_before(node):
                if node.op == "placeholder":
                    operand = gm.graph.placeholder(f"{node.name}{SUFFIX}_{suffix}")
                else:
                    operand = gm.graph.get_attr(f"{node.target}{SUFFIX}.{suffix}")
            operand.meta["val"] = tensor
            if "tensor_dict" in node.meta:  # what Dynamo knows of the parameter: that it stays where it is
                operand.meta["tensor_dict"] = node.meta["tensor_dict"]
            operands.append(operand)
        # Where the weight is first read, as a converted module does it: then the graphs of both are equal, and what was
        # compiled for the first run is found in Inductor's cache when the converted model is compiled.
        with gm.graph.inserting_before(min(node.users, default=gm.graph.output_node())):
            composed = weight = gm.graph.call_function(module.op, module.arguments(operands))
            if module.stored_shape != module.shape:
                weight = gm.graph.call_method("view", (composed, module.stored_shape))
        node.replace_all_uses_with(weight, propagate_meta=False)
        weight.meta = {key: value for key, value in node.meta.items() if key in ("val", "example_value")}
        if weight is not composed:
            composed.meta = {key: value.reshape(module.shape) for key, value in weight.meta.items()}
        gm.graph.erase_node(node)
        report.replaced.append(Decision(name, shape=tuple(weight.meta["val"].shape) if "val" in weight.meta else ()))
    if report.replaced:
        gm.recompile()
    return report
