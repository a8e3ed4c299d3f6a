"""The main job, small: it trains both models, compares, exports, reuses what is finished and resumes to the bit."""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.testing import example

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
TEXT = inspect.getsourcefile(torch.nn.functional)
TINY = (
    "--hidden 64 --intermediate 96 --layers 1 --heads 2 --vocab 512 --batch 2 --seq-len 32 --warmup 1 --eval-batches 2 "
    "--eval-every 5 --threads 1"
).split()


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *TINY, "--text", str(TEXT), "--out", str(out), *more]


def run(out: Path, *more: str) -> str:
    done = subprocess.run(command(out, *more), capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_models_are_trained_compared_exported_and_reused(tmp_path):
    printed = run(tmp_path / "run", "--steps", "10", "--plot", str(tmp_path / "spectra.svg"))
    assert re.search(r"Effective rank of the 7 factorized weights, mean: \d+ \(s B A\), \d+ \(S\), \d+ \(W\)", printed)
    assert "<svg" in (tmp_path / "spectra.svg").read_text()
    assert re.search(r"learning rate of the projections .* 0.0005 .* 0.0005 .* 1.00", printed)
    assert re.search(r"validation perplexity .* \d+\.\d .* \d+\.\d", printed)
    assert re.search(r"matmuls replaced .* 7 ", printed)
    assert "left dense: lm_head.weight 512x64, excluded" in printed
    assert re.search(r"onnxruntime against the trained model, logits \[2, 32, 512\]", printed)
    assert (tmp_path / "run" / "model.onnx").exists()
    again = run(tmp_path / "run", "--steps", "10")
    assert again.count("finished before, reusing the result") == 2


@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    more = ("--only", "sltrain", "--steps", "400", "--eval-every", "50")
    process = subprocess.Popen(
        command(tmp_path / "cut", *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 50:" in line:
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait() == 130
    assert "resuming" in run(tmp_path / "cut", *more)
    run(tmp_path / "whole", *more)
    cut, whole = (torch.load(tmp_path / name / "sltrain.pt", weights_only=True) for name in ("cut", "whole"))
    assert cut["step"] == whole["step"] == 400
    assert cut["loss"] == whole["loss"]
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name


def test_bad_flags_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    pretrain = example("pretrain")
    for flags, message in (
        (("--rank", "0"), "rank must be"),
        (("--density", "2"), "density must be"),
        (("--support", "largest"), "support='largest' puts the non-zeros where the approximation of a trained weight"),
        (("--hidden", "65"), "--hidden must be"),
        (("--device", "tpu"), "--device: must be one of"),
        (("--plot", "spectra.pdf"), "--plot: must be a .png or .svg file"),
        (("--plot", "missing/spectra.png"), "--plot: must be a .png or .svg file in a directory that is there"),
        (("--out", f"{__file__}/sub"), "--out: must be a directory that can be written or made"),
    ):
        monkeypatch.setattr(sys, "argv", command(tmp_path / "run", *flags)[1:])
        with pytest.raises(SystemExit) as stopped:
            pretrain.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"junk", b""])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "sltrain.pt").write_bytes(content)
    monkeypatch.setattr(sys, "argv", command(tmp_path, "--steps", "5", "--only", "sltrain")[1:])
    with pytest.raises(
        SystemExit, match=r"sltrain\.pt is no checkpoint of this script .*: give another --out, or --fresh"
    ):
        example("pretrain").main()
    assert [each.name for each in tmp_path.iterdir()] == ["sltrain.pt"]
