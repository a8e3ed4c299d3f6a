"""ONNX files as graphs to compare: nodes are called as what they compute, since ONNX names are optional."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slcompile.inspect.graph_diff import GraphDiff, compare
from slcompile.inspect.nodes import Node
from slcompile.inspect.snapshot import Snapshot


def onnx_diff(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> GraphDiff:
    """Compares the graphs of two ONNX files, as ``graph_diff`` does; weights are compared by name, type and shape.

    Raises:
        ImportError: onnx is not installed.
        ValueError: A file is missing, or holds no ONNX model.
    """
    name = f"{Path(before).name} -> {Path(after).name}"
    return compare(name, onnx_snapshot(before), onnx_snapshot(after))


def onnx_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Returns the graph of an ONNX file. Weights are not read: neither from files beside it, nor their values.

    Raises:
        ImportError: onnx is not installed.
        ValueError: The file is missing, or holds no ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files need onnx: pip install onnx") from error
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is no ValueError in every version
        raise ValueError(f"{path} holds no ONNX model: {error}") from error
    if not model.graph.node and not model.graph.initializer and not model.graph.output:
        raise ValueError(f"{path} holds no ONNX model: its graph is empty")  # any bytes may be a message without fields
    try:
        found = _snapshot(onnx, model.graph)
        for node in found.nodes:
            if bad := [each for each in (node.id, node.target, *node.inputs) if not isinstance(each, str)]:
                raise ValueError(f"{bad[0]!r:.200} is no text")  # protobuf gives what is no UTF-8 as bytes
        return found
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # types that do not exist, tensors cut short
        raise ValueError(f"{path} holds a broken ONNX model: {error}") from error


def _snapshot(onnx: Any, graph: Any) -> Snapshot:
    types = {each.name: _type(onnx, each) for each in (*graph.value_info, *graph.input, *graph.output)}
    found = Snapshot()
    weights = {each.name: (str(list(each.dims)), _dtype(onnx, each.data_type)) for each in graph.initializer}
    for value in graph.input:
        if value.name not in weights:  # an old file lists its weights among the inputs
            shape, dtype = types[value.name]
            found.add(Node(value.name, "placeholder", "input", "()", shape=shape, dtype=dtype), "")
    for name, (shape, dtype) in weights.items():
        found.add(Node(name, "get_attr", name, "()", (), shape, dtype, _owner(name), weight=name), f"{shape} {dtype}")
    producer: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        id = next((each for each in node.output if each), node.name or f"node_{index}")
        producer.update((each, id) for each in node.output if each)
        shape, dtype = types.get(id, ("", ""))
        inputs = [producer.get(each, each) for each in node.input if each]
        attributes = [
            f"{each.name}={_value(onnx, each)}" for each in sorted(node.attribute, key=lambda each: each.name)
        ]
        target = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        owner = next((_owner(each) for each in node.input if each in weights and _owner(each)), _scope(node.name))
        # Which output of an earlier node an input is, and which inputs are left out, are part of what it computes.
        places = ["%" if producer.get(each, each) == each else f"%{each}" for each in node.input]
        args = f"({', '.join([*(each or 'None' for each in node.input), *attributes])})"
        found.add(Node(id, "node", target, args, tuple(inputs), shape, dtype, owner), ", ".join([*places, *attributes]))
    outputs = [producer.get(each.name, each.name) for each in graph.output]
    names = ", ".join(each.name for each in graph.output)
    taken = {node.id for node in found.nodes}
    id = next(each for each in _output_names() if each not in taken)
    found.add(Node(id, "output", "output", f"({names})", tuple(outputs)), "")
    return found


def _output_names() -> Iterator[str]:
    yield "output"
    number = 1
    while True:
        yield f"output_{number}"
        number += 1


def _type(onnx: Any, value: Any) -> tuple[str, str]:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        return "", ""
    sizes = [each.dim_param or (each.dim_value if each.HasField("dim_value") else "?") for each in tensor.shape.dim]
    return f"[{', '.join(map(str, sizes))}]", _dtype(onnx, tensor.elem_type)


def _dtype(onnx: Any, data_type: int) -> str:
    name = str(onnx.TensorProto.DataType.Name(data_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _value(onnx: Any, attribute: Any) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        size = 1
        for dim in value.dims:
            size *= dim
        numbers = onnx.numpy_helper.to_array(value).tolist() if size <= 16 else f"{size} numbers"
        return f"{numbers} {_dtype(onnx, value.data_type)}"
    if isinstance(value, onnx.GraphProto):
        return f"<graph of {len(value.node)} nodes>"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _owner(weight: str) -> tuple[tuple[str, str], ...]:
    """Returns the modules around a weight ``layers.0.linear.weight``; their classes are not known."""
    return _nested(weight.split(".")[:-1])


def _scope(node: str) -> tuple[tuple[str, str], ...]:
    """Returns the modules around a node ``/layers.0/linear/Gemm``, as TorchScript's exporter names them."""
    return _nested(node.split("/")[1:-1]) if node.startswith("/") else ()


def _nested(parts: list[str]) -> tuple[tuple[str, str], ...]:
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return tuple((path, "") for path in paths)
