from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn
from transformers import AutoModelForCausalLM

import slcompile
from slcompile import cli
from slcompile.cli import main
from slcompile.cli.sources import example_inputs
from slcompile.cost import stored
from slcompile.export.checkpoint import load_factorized, save_factorized
from slcompile.measure import measure_rates
from tests.testing import CONFIG, randomize
from tests.zoo import tiny, tiny_config

# As in tests/export/test_architectures.py: at most 100 operators in sequence, sums of at most 256 terms.
BOUND = {torch.float32: 160 * 2**-24, torch.float16: 10 * 2**-11}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = randomize(slcompile.factorize_(tiny("llama"), CONFIG))
    return save_factorized(model, tmp_path_factory.mktemp("checkpoint"))


def onnx_logits(path: Path) -> np.ndarray:
    ids = np.arange(33).reshape(3, 11)  # neither the batch nor the length that it was exported with
    return onnxruntime.InferenceSession(path).run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def torch_logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.arange(33).reshape(3, 11)).logits.numpy()


def assert_close(got: np.ndarray, wanted: np.ndarray, dtype: torch.dtype) -> None:
    assert np.abs(got - wanted).max() < BOUND[dtype] * np.abs(wanted).max()


@pytest.mark.slow
def test_onnx_and_merged(checkpoint, tmp_path, capsys):
    file, directory = tmp_path / "model.onnx", tmp_path / "merged"
    assert main(["export", str(checkpoint), "--onnx", str(file), "--merged", str(directory)]) == 0
    out, _ = capsys.readouterr()
    assert f"merged weights in {directory}" in out
    assert "model.onnx: opset " in out
    assert "onnxruntime against the trained model, logits [2, 16, 128]: largest difference" in out
    assert "onnxruntime against the trained model, logits [1, 8, 128]: largest difference" in out
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())  # which asks for factors
    wanted = torch_logits(load_factorized(checkpoint))
    assert_close(onnx_logits(file), wanted, torch.float32)
    np.testing.assert_array_equal(torch_logits(AutoModelForCausalLM.from_pretrained(directory)), wanted)


@pytest.mark.slow
def test_dtype_compact_and_no_verify(checkpoint, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    options = ["--dtype", "float16", "--compact", "--no-verify", "--opset", "19"]
    assert main(["export", str(checkpoint), "--onnx", str(file), *options]) == 0
    out, _ = capsys.readouterr()
    assert "opset 19, float16" in out
    assert "not run in onnxruntime" in out
    assert "largest difference" not in out
    stored = {each.name: each.data_type for each in onnx.load(file).graph.initializer}
    assert stored["lm_head.weight"] == TensorProto.FLOAT16
    assert "model.layers.0.mlp.up_proj.weight" not in stored  # its factors are
    assert_close(onnx_logits(file), torch_logits(load_factorized(checkpoint)), torch.float16)


def test_merged_in_shards_of_a_dtype(checkpoint, tmp_path):
    options = ["--merged", str(tmp_path), "--dtype", "bfloat16", "--shard-size", "50000"]
    assert main(["export", str(checkpoint), *options]) == 0
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}


SCRIPT = """
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="slcompile")  # as the file that an installer writes
sys.exit(script.load()())
"""


@pytest.mark.slow
def test_the_console_script(checkpoint, tmp_path):
    command = [sys.executable, "-c", SCRIPT, "export", checkpoint, "--merged", tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert f"merged weights in {tmp_path}" in child.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(torch_logits(merged), torch_logits(load_factorized(checkpoint)))


def test_a_target_is_required(checkpoint, capsys):
    assert main(["export", str(checkpoint)]) == 2
    assert "give --onnx FILE, --merged DIR, or both" in capsys.readouterr().err


def test_bad_arguments_are_one_line_and_exit_code_2(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command, message in (
        ([str(tmp_path), "--onnx", "model.onnx"], f"{tmp_path} must hold config.json"),
        ([str(tmp_path / "missing"), "--merged", "merged"], "must hold config.json"),
        ([str(checkpoint), "--onnx", str(tmp_path)], "path must be a file, got the directory"),
        ([str(checkpoint), "--merged", str(tmp_path / "file")], "directory must be a directory, got the file"),
        ([str(checkpoint), "--merged", str(tmp_path / "merged"), "--shard-size", "0"], "shard_size must be"),
        ([str(checkpoint), "--merged", f"{checkpoint}/../{checkpoint.name}"], "--merged must be another directory"),
        (
            [str(checkpoint), "--merged", str(tmp_path / "merged"), "--onnx", str(tmp_path / "no" / "a.onnx")],
            "no does not exist",
        ),
    ):
        assert main(["export", *command]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("slcompile: ")
        assert message in err
        assert err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(checkpoint, tmp_path, capsys):
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    assert main(["export", str(tmp_path), "--merged", str(tmp_path / "merged")]) == 2
    assert capsys.readouterr().err.startswith("slcompile: ")


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "vit"])
def test_example_inputs_fit_the_model(kind):
    model = tiny(kind).eval()
    inputs, dynamic_shapes = example_inputs(model)
    assert model.main_input_name in inputs
    assert inputs.keys() <= inspect.signature(model.forward).parameters.keys()  # others have no dynamic shapes
    assert model(**inputs).logits.shape[0] == inputs[model.main_input_name].shape[0]
    text = {0: "batch_size", 1: "sequence_length"}
    expected = {"use_cache": None, "pixel_values": {0: "batch_size"}}
    assert dynamic_shapes == {name: expected.get(name, text) for name in inputs}


@pytest.mark.slow
def test_rates_are_measured_stored_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cli.rates, "measure_rates", functools.partial(measure_rates, seconds=0.001))
    threads = str(torch.get_num_threads())
    stored._rates.cache_clear()
    try:
        assert main(["rates", "--threads", threads]) == 0
        defaults = capsys.readouterr().out
        assert defaults.startswith("defaults of the device's class")
        assert main(["rates", "--threads", threads, "--measure"]) == 0
        (file,) = tmp_path.iterdir()
        measured = capsys.readouterr().out
        assert measured.startswith(f"measured, stored in {file}")
        assert main(["rates", "--threads", threads]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == measured.splitlines()[1:]
        file.write_text("{}")
        stored._rates.cache_clear()
        assert main(["rates", "--threads", threads]) == 2
        assert "holds no rates" in capsys.readouterr().err
        assert main(["rates", "--threads", threads, "--measure"]) == 0
    finally:
        stored._rates.cache_clear()


@pytest.mark.parametrize("flags", [["--device", "tpu"], ["--threads", "0"], ["--threads", "100000"]])
def test_rates_refuse_a_bad_flag(capsys, flags):
    assert main(["rates", *flags]) == 2
    assert f"{flags[0]} must be" in capsys.readouterr().err


TINY_MEMORY = ["--rank", "0.25", "--density", "0.05", "--seq-len", "32"]


@pytest.mark.slow
def test_memory_prints_writes_json_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "report.json").write_text("old")
    outputs = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "chart.svg")]
    assert main(["memory", "--hf", str(tmp_path / "config.json"), *TINY_MEMORY, *outputs]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["rank"] == 0.25
    assert report["settings"]["compiled"] == "model"
    assert f"{report['variants']['sltrain']['peak'] / 1e6:,.2f}" in printed
    assert f"chart in {tmp_path / 'chart.svg'}" in printed
    drawn = (tmp_path / "chart.svg").read_text()
    assert drawn.count("<svg") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["chart.svg", "config.json", "report.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seq-len", "0"], "--seq-len must be at least 1, got 0"),
        (["--plot", "chart.pdf"], "path of the chart must end in .png or .svg, got 'chart.pdf'"),
        (["--json", "no/such/report.json"], "does not exist"),
        (["--memory-budget", "6XB"], "memory_budget got '6XB' with the unit 'XB'"),
        (["--memory-budget", "6GB", "--save", "all"], "memory_budget=6000000000 needs save='auto'"),
        (["--structure", "cp", "--density", "0.1"], "density=0.1 means nothing for structure='cp'"),
        (["--structure", "tensor_train", "--blocks", "4"], "which is not cut into blocks"),
        (["--density", "2"], "density must be a number in (0, 1], or 0 with base='frozen', got 2.0"),
        (["--rank", "many"], "rank must be an int >= 1, or a fraction of min(rows, columns) in (0, 1), got 'many'"),
        (["--rank", "-3"], "rank must be an int >= 1, or a fraction of min(rows, columns) in (0, 1), got -3"),
    ],
)
def test_memory_refuses_before_it_estimates(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(cli.memory, "estimate_memory", lambda *args, **kwargs: pytest.fail("it went on"))
    assert main(["memory", "--model", "llama-60m", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("structure", "count"), [("cp", 4 * (8 + 96 // 8 + 64)), ("block_low_rank", 4 * (96 + 64))])
def test_memory_of_another_structure(structure, count, tmp_path, capsys, monkeypatch):
    made = "import torch\ndef make():\n    return torch.nn.Linear(64, 96, bias=False), (torch.randn(8, 64),)\n"
    (tmp_path / "narrow_models.py").write_text(made)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--structure", structure, "--rank", "4", "--blocks", "8", "--base", "frozen", "--device", "cpu"]
    assert main(["memory", "narrow_models:make", *flags, "--json", str(tmp_path / "report.json")]) == 0
    assert f"structure {structure}, rank 4, blocks 8, base frozen" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["structure"] == structure
    assert report["variants"]["sltrain"]["parameter_count"] == count
    assert report["variants"]["dense"]["parameter_count"] == 64 * 96
    with pytest.raises(SystemExit):
        main(["memory", "narrow_models:make", "--structure", "cpp"])
    assert "--structure: invalid choice: 'cpp'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_of_a_factorys_model(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(64, 96), (torch.randn(8, 64),)\n"
        "def wrong():\n"
        "    return torch.nn.Linear(64, 96), (torch.randn(8, 65),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["memory", "my_models:make", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["dtype"] == "float32"  # the model's own
    assert report["variants"]["dense"]["parameter_count"] == 65 * 96
    assert report["budget"] is None
    assert "my_models:make" in capsys.readouterr().out
    assert main(["memory", "my_models:make", "--memory-budget", "1kB", "--json", str(tmp_path / "report.json")]) == 0
    budget = json.loads((tmp_path / "report.json").read_text())["budget"]
    assert (budget["budget"], budget["pass"]) == (1000, "fit_budget")
    assert budget["peak"] == 1000 + budget["missing"]
    assert f"{budget['missing']:,} bytes are missing" in capsys.readouterr().out
    assert main(["memory", "my_models:make", "--batch", "2"]) == 2
    assert "--batch must be left out with a factory" in capsys.readouterr().err
    assert main(["memory", "my_models:wrong"]) == 2
    assert "estimating my_models:wrong failed with RuntimeError" in capsys.readouterr().err


def test_drawing_without_matplotlib_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["memory", "--model", "llama-60m", "--plot", "chart.png"]) == 2
    assert 'pip install "slcompile[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export any --merged out --compact", "--compact is of the ONNX file: give --onnx FILE, too"),
        ("export any --merged out --opset 18", "--opset is of the ONNX file: give --onnx FILE, too"),
        ("diff any:make --html page --json ./page", "--html and --json must be two files, got page for both"),
        ("memory any:make --plot c.svg --json ./c.svg", "--plot and --json must be two files, got c.svg for both"),
        ("compress any:make --calibration any:texts --merged out --lr 1e-4", "--lr is of --distill-steps, got 0.0001"),
        ("diff any:make --shape 3x3", "--shape is of --hf, got '3x3' without it"),
        ("diff any:make missing.onnx", "missing.onnx is no file"),
        ("suggest any:make --budget 0.5 --config rank=8", "--config must leave rank out"),
        ("compress any:make --calibration any:texts --merged out --rank 4 --config rank=8", "must leave rank out"),
        (
            "compress any:make --calibration any:texts --merged out --density 0.1 --config density=1",
            "leave density out",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused_before_any_work(command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2  # any is no module: importing it would be work
    assert message in capsys.readouterr().err


def test_an_interrupted_command_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.memory, "estimate_memory", interrupted)
    assert main(["memory", "--model", "llama-60m"]) == 130
    assert capsys.readouterr().err == "slcompile: interrupted\n"
