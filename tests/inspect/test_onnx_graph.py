from __future__ import annotations

import pytest
import torch

from slcompile.cli import main
from slcompile.inspect.onnx_graph import onnx_diff, onnx_snapshot

onnx = pytest.importorskip("onnx")
helper = onnx.helper


def write(path, activation: str, dtype: int = onnx.TensorProto.FLOAT, prefix: str = "") -> str:
    """``activation(x W1) W2`` with another name for each inner value, as an exporter may give."""
    size = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.DOUBLE: 8}.get(dtype, 2)
    weights = [helper.make_tensor(f"layers.{i}.weight", dtype, (4, 4), b"\0" * 4 * 4 * size, raw=True) for i in (0, 1)]
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.weight"], [f"{prefix}h"]),
        helper.make_node(activation, [f"{prefix}h"], [f"{prefix}a"]),
        helper.make_node("MatMul", [f"{prefix}a", "layers.1.weight"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, dtype, ("n", 4)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph), path)
    return str(path)


def test_two_files(tmp_path):
    first, second = write(tmp_path / "a.onnx", "Relu"), write(tmp_path / "b.onnx", "Tanh", prefix="v")
    found = onnx_diff(first, second)
    assert found.counts == {"kept": 6, "removed": 0, "new": 0, "rewritten": 1}
    assert found.text().splitlines() == [
        "a.onnx -> b.onnx: 6 kept, 0 removed, 0 new, 1 rewritten",
        "  ...",
        "  layers.1.weight = layers.1.weight()  # [4, 4] float32",
        "  h = MatMul(x, layers.0.weight)",
        "- a = Relu(h)",
        "- y = MatMul(a, layers.1.weight)  # [n, 4] float32",
        "+ va = Tanh(h)",
        "+ y = MatMul(va, layers.1.weight)  # [n, 4] float32",
        "  output = output(y)",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_is_a_rewriting_under_torchs_name(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    stored = getattr(onnx.TensorProto, {"float64": "DOUBLE"}.get(name, name.upper()))
    first = write(tmp_path / "a.onnx", "Relu")
    second = write(tmp_path / "b.onnx", "Relu", dtype=stored)
    changed = {node.id: node.dtype for node in onnx_diff(first, second).after if node.status == "rewritten"}
    assert changed == dict.fromkeys(("x", "layers.0.weight", "layers.1.weight", "y"), name)


def test_modules_are_those_around_the_weights(tmp_path):
    nodes = {node.id: node for node in onnx_snapshot(write(tmp_path / "a.onnx", "Relu")).nodes}
    assert nodes["h"].module == (("layers", ""), ("layers.0", ""))
    assert nodes["layers.0.weight"].weight == "layers.0.weight"


def test_the_command_line(tmp_path, capsys):
    first, second = write(tmp_path / "a.onnx", "Relu"), write(tmp_path / "b.onnx", "Tanh")
    assert main(["diff", first, second, "--json", str(tmp_path / "d.json")]) == 0
    assert "6 kept, 0 removed, 0 new, 1 rewritten" in capsys.readouterr().out
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    for command, message in (
        ([first, str(tmp_path / "bad.onnx")], "holds no ONNX model"),
        ([first, str(tmp_path / "none.onnx")], "is no file"),
        ([first], "give PACKAGE.MODULE:FACTORY"),
        ([first, second, "--config", "rank=3"], "--config is of what replaces weights"),
    ):
        assert main(["diff", *command]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Relu", b"Re\xfcu", "is no text"),
        (b"layers.0.weight", b"layers.0.\xff\xfeight", "broken ONNX model"),
        (None, b"", "its graph is empty"),
    ],
)
def test_a_broken_file_is_one_clear_error(old, new, message, tmp_path):
    path = tmp_path / "a.onnx"
    healthy = write(path, "Relu")
    content = path.read_bytes()
    (tmp_path / "b.onnx").write_bytes(new if old is None else content.replace(old, new))
    with pytest.raises(ValueError, match=message):
        onnx_diff(healthy, tmp_path / "b.onnx")
