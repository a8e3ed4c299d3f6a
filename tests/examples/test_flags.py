"""Flags that a program cannot use end it before any work, with one line that names the flag and what is allowed."""

from __future__ import annotations

import argparse
import sys

import pytest

from tests.testing import example

pytestmark = pytest.mark.slow

REFUSED = {
    "benchmark": [
        (["--rank", "0"], "--rank: rank must be an int >= 1"),
        (["--density", "4"], "--density: density must be a number in (0, 1]"),
        (["--vector", "5"], "--vector: vector must be one of"),
        (["--batch", "-1"], "--batch: must be an int of at least 1, got '-1'"),
    ],
    "c4": [
        (["--size", "tiny", "--data", "hub", "--weight-decay", "-1"], "--weight-decay must be a finite number of at"),
        (["--size", "tiny", "--data", "hub", "--out", __file__], "--out: must be a directory that can be"),
        (["--size", "tiny", "--data", "hub", "--device", "tpu"], "--device: must be one of ['cpu'"),
    ],
    "explain_cost": [(["--rounds", "0"], "--rounds: must be an int of at least 1, got '0'")],
    "finetune": [
        (["--rank", "0"], "--rank: must be an int of at least 2, got '0'"),
        (["--lr", "1e-3", "-1"], "--lr: must be a finite number above 0, got '-1'"),
        (["--steps", "x"], "--steps: must be an int of at least 1, got 'x'"),
        (["--passages", "0"], "--passages: must be an int of at least 1"),
    ],
    "many_gpus": [
        (["--rank", "0"], "--rank: rank must be an int >= 1"),
        (["--length", "0"], "--length: must be an int of at least 1"),
    ],
    "many_processes": [
        (["--model", "llama"], "--model: invalid choice: 'llama'"),
        ([], "start it by torchrun: torchrun --standalone --nproc-per-node 2 many_processes.py"),
    ],
    "onnx_figures": [
        (["--repeats", "0"], "--repeats: must be an int of at least 1"),
        (["--hidden", "100"], "--hidden must be a multiple of 8, the heads, got 100"),
    ],
    "pretrain_distributed": [
        (["--steps", "-1"], "--steps: must be an int of at least 1, got '-1'"),
        (["--text", "missing.txt"], "--text: must be a file, got 'missing.txt'"),
        (["--out", f"{__file__}/sub"], "--out: must be a directory that can be written or made, got"),
        ([], "start it by torchrun: torchrun --standalone --nproc-per-node 2 pretrain_distributed.py"),
    ],
    "recover": [
        (["--steps", "0"], "--steps: must be an int of at least 1, got '0'"),
        (["--budget", "7"], "--budget: must be a number in (0, 1), got '7'"),
        (["--model", "missing"], "--model: must be a file, got 'missing/tokenizer.json'"),
        (["--text", __file__], "--text must be more than 4 files, of which the last 4 are held out"),
        (["--moves", "5"], "--moves needs --budget"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_before_any_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    program = example(name)
    for flags, message in REFUSED[name]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_distributed_training_goes_on_with_its_own_flags_alone(tmp_path, monkeypatch):
    script = example("pretrain_distributed")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")

    def start(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pretrain_distributed.py", "--out", str(tmp_path), *flags])
        script.require_flags(script.parse_args())

    start("--lr", "1e-3")
    start("--lr", "3e-3")  # nothing was saved
    (tmp_path / "checkpoints" / "step-00000050").mkdir(parents=True)
    start("--lr", "3e-3", "--steps", "200")
    with pytest.raises(SystemExit, match=r"was made with --lr 0.003, got 0.001: give that, or another --out"):
        start("--lr", "1e-3")


def test_a_chart_without_matplotlib_is_refused(monkeypatch, tmp_path):
    flags = example("flags")
    assert flags.chart(str(tmp_path / "curves.png")) == tmp_path / "curves.png"
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match=r"needs matplotlib: pip install"):
        flags.chart(str(tmp_path / "curves.png"))
