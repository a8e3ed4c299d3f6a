from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import slcompile
from slcompile.cli import main
from slcompile.inspect.export_diff import export_diff
from tests.testing import CONFIG, some_of
from tests.zoo import tiny, tiny_config

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FACTORY = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)), (torch.randn(8, 64),)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_factorized", some_of([False, True], [True]))
def test_matmuls_are_linked_by_the_weights_names(block, batch, tmp_path, is_factorized):
    if is_factorized:
        slcompile.factorize_(block, CONFIG, example_args=(batch[0],))
    path = slcompile.export_onnx(block, (batch[0],), tmp_path / "m.onnx", verify=False).path
    found = export_diff(block, slcompile.explain(block, (batch[0],)), path)
    before, after = ({node.id: node for node in side} for side in (found.before, found.after))
    assert sorted(link.weight for link in found.matmuls) == ["down.weight", "head.weight", "mix", "up.weight"]
    for link in found.matmuls:
        assert after[link.after].target in ("Gemm", "MatMul")
        assert (after[link.after].status, after[link.after].origins) == ("rewritten", (link.before,))
        assert before[link.before].status == "rewritten"
        # The file's weight comes from the parameter, or from what composes it.
        (origin,) = after[link.weight].origins
        assert before[origin].weight == ("" if is_factorized and link.weight != "head.weight" else link.weight)
    (up,) = (link for link in found.matmuls if link.weight == "up.weight")
    assert before[up.before].target == "torch._C._nn.linear"
    assert after[up.after].module == (("up", "Linear"),)
    lines = found.text().splitlines()
    assert lines[0] == "Block -> m.onnx: 4 of 4 matmuls with a parameter are in both"
    assert not any(line.startswith("only") for line in lines)
    assert slcompile.GraphDiff.from_json(found.to_json(tmp_path / "d.json")) == found


@pytest.mark.slow
def test_what_is_missing_and_what_only_the_file_has(block, batch, tmp_path):
    path = slcompile.export_onnx(block, (batch[0],), tmp_path / "m.onnx", verify=False, dtype=torch.float16).path
    proto = onnx.load(path)
    for initializer in proto.graph.initializer:
        if initializer.name == "mix":
            initializer.name = "strange"
    for node in proto.graph.node:
        node.input[:] = ["strange" if name == "mix" else name for name in node.input]
    onnx.save(proto, path)
    found = export_diff(block, slcompile.explain(block, (batch[0],)), path)
    mix, strange = (link for link in found.matmuls if link.weight in ("mix", "strange"))
    assert (mix.after, strange.before) == ("", "")
    lines = found.text().splitlines()
    assert lines[0] == "Block -> m.onnx: 3 of 5 matmuls with a parameter are in both"
    assert lines[lines.index("only before") + 1] == f"  mix: matmul {mix.before}"
    assert lines[lines.index("only after") + 1] == f"  strange: MatMul {strange.after}"
    assert "  up.weight: [96, 64] float32 -> [96, 64] float16" in lines
    before, after = ({node.id: node.status for node in side} for side in (found.before, found.after))
    assert (before[mix.before], after[strange.after], after["up.weight"]) == ("removed", "new", "rewritten")


@pytest.mark.slow
def test_the_parts_of_a_broken_model_and_a_tied_weight(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
            self.head.weight = self.table.weight
            self.breaks = False

        def forward(self, ids):
            x = self.table(ids)
            if self.breaks:
                torch._dynamo.graph_break()
            return self.head(self.mid(self.mid(x)))

    model, ids = Tied(), torch.randint(50, (4, 8))
    path = slcompile.export_onnx(model, (ids,), tmp_path / "m.onnx", verify=False).path
    model.breaks = True
    found = export_diff(model, slcompile.explain(model, (ids,)), path)
    assert sorted(link.weight for link in found.matmuls) == ["mid.weight", "mid.weight", "table.weight"]
    assert all(link.before.startswith("1.") and link.after for link in found.matmuls)
    assert len({link.after for link in found.matmuls}) == 3
    assert len({node.id for node in found.before}) == len(found.before)


@pytest.mark.slow
def test_the_command_line(tmp_path, monkeypatch, capsys):
    name = f"exported_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    slcompile.export_onnx(model, (torch.randn(8, 64),), "m.onnx", verify=False)
    slcompile.export_onnx(nn.ReLU(), (torch.randn(8, 64),), "other.onnx", verify=False)
    assert main(["diff", f"{name}:model", "m.onnx", "--json", "d.json", "--html", "d.html"]) == 0
    assert "Sequential -> m.onnx: 2 of 2 matmuls with a parameter are in both" in capsys.readouterr().out
    document = json.loads((tmp_path / "d.json").read_text())
    assert document["schema"] == "slcompile.graph_diff/2"
    assert [each["weight"] for each in document["matmuls"]] == ["0.weight", "2.weight"]
    assert "Sequential -&gt; m.onnx" in (tmp_path / "d.html").read_text()
    for command, message in (
        ([f"{name}:model", "other.onnx"], "other.onnx holds no weight of the model"),
        ([f"{name}:model", "none.onnx"], "none.onnx is no file"),
        ([f"{name}:model", "m.onnx", "--config", "rank=3"], "--config is of what replaces weights"),
        ([f"{name}:model", "m.onnx", "other.onnx"], "give PACKAGE.MODULE:FACTORY or --hf CONFIG.json"),
    ):
        assert main(["diff", *command]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_transformers_config_and_its_export(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 50}
    config = tiny_config("llama", use_cache=False, **sizes)
    config.save_pretrained(tmp_path)
    model, ids = tiny("llama", use_cache=False, **sizes), torch.randint(50, (2, 8))
    slcompile.export_onnx(model, (), tmp_path / "m.onnx", kwargs={"input_ids": ids}, verify=False)
    command = ["diff", "--hf", str(tmp_path / "config.json"), str(tmp_path / "m.onnx"), "--shape", "2x8"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM -> m.onnx: 8 of 8 matmuls with a parameter are in both" in printed
    assert "only" not in printed
