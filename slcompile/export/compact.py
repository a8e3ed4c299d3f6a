"""A small ONNX file: the factors, and standard operators over constants that compose the weights at load."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.names import SUFFIX, plain_name
from slcompile.ops.support import flat_positions, uniform_dtype
from slcompile.weight.sl_weight import Factors, SLWeight


def compose_in_graph(graph: Any, model: nn.Module, twin: nn.Module) -> None:
    """Replaces the dense initializer of each factorized weight by ``s B A`` plus the values at their flat positions.

    The operators (MatMul, Reshape, ScatterElements, Cast) read constants alone: a runtime that folds constants runs
    them once, when it loads the file, and afterwards holds dense weights as if they had been stored. The weight keeps
    its name, as the name of the last operator's output.

    Args:
        graph: An ``onnx_ir.Model``, changed in place.
        model: The factorized model.
        twin: Its dense twin: tells which names stand for one tied weight.
    """
    parameters = {name: id(each) for name, each in twin.named_parameters(remove_duplicate=False)}
    weights = {
        parameters[plain_name(path).removesuffix(SUFFIX)]: module
        for path, module in model.named_modules()
        if isinstance(module, SLWeight) and not module.has_base  # with a base, factors make no smaller file
    }
    first = graph.graph[0]
    for name in list(graph.graph.initializers):
        weight = weights.get(parameters.get(name, -1))
        if weight is not None:
            graph.graph.insert_before(first, _compose(graph, name, graph.graph.initializers.pop(name), weight))


def _compose(graph: Any, name: str, dense: Any, weight: SLWeight) -> list[Any]:
    """Returns the nodes that compose one weight, with ``dense`` replaced by their result everywhere."""
    import onnx_ir as ir

    def constant(suffix: str, tensor: Tensor) -> Any:
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{suffix} of weight {name} has values beyond the range of {dtype}; nothing was written"
                )
        value = ir.Value(name=f"{name}{SUFFIX}.{suffix}")
        value.const_value = ir.tensor_adapters.TorchTensor(tensor.cpu().contiguous(), value.name)
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
        graph.graph.register_initializer(value)
        return value

    def node(operator: str, inputs: list[Any], attributes: dict[str, Any] | None = None) -> Any:
        nodes.append(ir.node(operator, inputs, attributes))
        return nodes[-1].outputs[0]

    def wide(value: Any) -> Any:
        # In float32, as merged weights are composed; onnxruntime folds no float16 ScatterElements on the CPU.
        return value if dtype in (torch.float32, torch.float64) else node("Cast", [value], {"to": ir.DataType.FLOAT})

    nodes: list[Any] = []
    dtype = ir.tensor_adapters.to_torch_dtype(dense.const_value.dtype)
    parts = weight.factors()
    support = weight.seed if parts.index is None else parts.index
    positions = flat_positions(parts.values, support, weight.shape[-1], parts.vector)
    index = constant("index", positions.to(uniform_dtype(*weight.as_matrix)))
    B, A = (wide(constant(*each)) for each in zip("BA", _balanced(parts), strict=True))
    values = wide(constant("values", parts.values.flatten()))
    flat = node("Reshape", [node("MatMul", [B, A]), constant("flat", torch.tensor([-1]))])
    added = node("ScatterElements", [flat, index, values], {"axis": 0, "reduction": "add"})
    output = node("Reshape", [added, constant("shape", torch.tensor(weight.stored_shape))])
    if dtype not in (torch.float32, torch.float64):
        output = node("Cast", [output], {"to": dense.const_value.dtype})
    output.shape, output.type = dense.shape, dense.type
    dense.replace_all_uses_with(output)
    dense.name = None
    output.name = name
    return nodes


def _balanced(parts: Factors) -> tuple[Tensor, Tensor]:
    """Returns factors whose product is ``s B A``, in at least float32, their largest entries at most 2-fold apart.

    A float16 then holds them where it holds the weight, or nearly so. A is multiplied by a power of two, so that it is
    rounded no more than it was.
    """
    wide = torch.promote_types(parts.B.dtype, torch.float32)
    B, A = parts.B.to(wide) * parts.scale, parts.A.to(wide)
    largest_B, largest_A = (float(each.abs().max()) for each in (B, A))
    if not largest_B or not largest_A:
        return B, A
    power = round((math.log2(largest_B) - math.log2(largest_A)) / 2)
    return B * 2.0**-power, A * 2.0**power
