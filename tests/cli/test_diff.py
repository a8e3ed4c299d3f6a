from __future__ import annotations

import json

import pytest

import slcompile
from slcompile.cli import main

FACTORIES = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), (torch.randn(32, 64),)

def failing():
    raise RuntimeError("no data here")

def explained():
    try:
        {}["DATA_DIR"]
    except KeyError as error:
        raise ValueError("set DATA_DIR") from error

def leaves():
    raise SystemExit(0)

def without_matmul():
    return nn.ReLU(), (torch.randn(8, 65),)

def wrong():
    return 3

def mismatched():
    return nn.Linear(64, 64), (torch.randn(8, 65),)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch) -> str:
    """Name of a module in the current directory; another one for each test, since modules are imported once."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_factory(factories, tmp_path, capsys):
    command = ["diff", f"{factories}:model", "--config", "rank=8", "exclude=2*", "--json", "e.json", "--html", "e.html"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Sequential: 1 of 2 matmuls with a parameter replaced" in printed
    assert "1 excluded: by the include and exclude patterns" in printed
    found = slcompile.Explanation.from_json("e.json")
    assert (found.config["rank"], found.config["exclude"]) == (8, ("2*",))
    assert (tmp_path / "e.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_errors_are_one_line_and_leave_no_file(factories, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for command, message in (
        ([f"{factories}:failing"], f"the factory {factories}:failing failed with RuntimeError: no data here"),
        ([f"{factories}:explained"], f"the factory {factories}:explained failed with ValueError: set DATA_DIR"),
        ([f"{factories}:leaves"], f"the factory {factories}:leaves ended the process with sys.exit(0)"),
        ([f"{factories}:wrong"], f"the factory {factories}:wrong must return (model, args)"),
        ([f"{factories}:mismatched"], f"tracing {factories}:mismatched failed with RuntimeError"),
        ([f"{factories}:modle"], "has no function 'modle', did you mean 'model'?"),
        (["no_such_module:model"], "importing no_such_module failed with ModuleNotFoundError"),
        ([factories], "a model is given as PACKAGE.MODULE:FACTORY"),
        ([], "give PACKAGE.MODULE:FACTORY or --hf CONFIG.json, perhaps with an ONNX file, or two ONNX files"),
        ([f"{factories}:failing", "--json", "missing/e.json"], "does not exist"),
        ([f"{factories}:failing", "--html", "folder"], "path must be a file"),
        ([f"{factories}:model", "--config", "rnk=3"], "unknown option 'rnk', did you mean 'rank'?"),
        ([f"{factories}:model", "--config", "rank"], "--config takes KEY=VALUE, got 'rank'"),
        (["--hf", "missing.json"], "--hf must be a config.json"),
    ):
        assert main(["diff", *command]) == 2, command
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("slcompile: ")
        assert message in err
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == {"folder", f"{factories}.py"}


@pytest.mark.slow
def test_a_transformers_config(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["diff", "--hf", str(tmp_path / "config.json"), "--shape", "2x16"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 14 of 15 matmuls with a parameter replaced" in printed
    assert "mlp.up_proj.weight x2" in printed
    assert main(["diff", "--hf", str(tmp_path / "config.json"), "--shape", "2"]) == 2
    assert "--shape must be BATCHxLENGTH" in capsys.readouterr().err


def test_a_repeated_flag_adds_to_what_was_given(factories, tmp_path):
    given = ["--config", "rank=8", "--config", "exclude=('2*',)", "--json", "e.json"]
    assert main(["diff", f"{factories}:model", *given]) == 0
    found = slcompile.Explanation.from_json("e.json").config
    assert (found["rank"], found["exclude"]) == (8, ("2*",))


def test_a_model_without_a_matmul_is_explained(factories, capsys):
    assert main(["diff", f"{factories}:without_matmul", "--html", "e.html", "--json", "e.json"]) == 0
    assert "ReLU: 0 of 0 matmuls" in capsys.readouterr().out
    assert slcompile.Explanation.from_json("e.json").matmuls == ()
