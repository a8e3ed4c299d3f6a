"""The recovery, of a BERT of one layer that is no better than random: what is measured, and that training helps."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slcompile
from tests.testing import example

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "recover.py"
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


def test_texts_of_too_few_passages_are_refused_before_any_work(tiny_bert, monkeypatch, capsys):
    source, texts = tiny_bert
    for text in texts[1:]:
        text.write_text("word " * 45)
    recover = example("recover")
    monkeypatch.setattr(recover, "load", None)
    monkeypatch.setattr(sys, "argv", ["recover.py", "--model", str(source), "--text", *map(str, texts)])
    with pytest.raises(SystemExit, match="2"):
        recover.main()
    assert "in its last 4 files more than 10, got" in " ".join(capsys.readouterr().err.split())


def test_muon_steps_all_factors_and_bfloat16_is_what_both_models_compute_in(tiny_bert, monkeypatch):
    source, texts = tiny_bert
    recover = example("recover")
    tokenizer = recover.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    encoded = recover.encode(tokenizer, recover.passages(texts))
    dense, student = recover.load(source), recover.load(source)
    slcompile.factorize_(student, slcompile.SLConfig(rank=0.25, density=0.05, seed=0))
    computed = []
    for module in (dense, student):
        module.encoder.layer[0].output.dense.register_forward_hook(lambda *found: computed.append(found[-1].dtype))

    def similarity() -> float:
        return (recover.embeddings(student, encoded) * recover.embeddings(dense, encoded)).sum(1).mean().item()

    muons, muon = [], torch.optim.Muon
    monkeypatch.setattr(torch.optim, "Muon", lambda *args, **kwargs: muons.append(muon(*args, **kwargs)) or muons[0])
    before = similarity()
    computed.clear()
    args = argparse.Namespace(lr=1e-3, steps=30, batch=8, moves=None, dtype="bfloat16")
    with torch.compiler.set_stance("force_eager"):
        recover.recover(student, dense, encoded, args)
    assert computed == [torch.bfloat16] * 60
    assert len(muons[0].state) == 2 * len(slcompile.factors(student))
    assert {each.dtype for each in [*student.parameters(), *dense.parameters()]} == {torch.float32}
    assert similarity() > before + 0.02


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "gain"),  # what is compressed for its inputs has lost little
    [("--rank 0.25", 0.02), ("--budget 0.15 --density 0.02 --calibration 64 --moves 10", 0.001)],
)
def test_a_short_training_recovers_some_of_what_the_approximation_lost(how, gain, tiny_bert):
    source, texts = tiny_bert
    flags = f"--steps 30 {how} --batch 8 --tokens 16 --passages 20".split()
    command = [sys.executable, str(SCRIPT), "--model", str(source), "--text", *map(str, texts), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"(dense|before|after) .*?([\d,]+) .*?(\d\.\d+) .*?(\d\.\d+) .*?([\d.]+)%", done.stdout)
    (_, size, *exact, _), (_, small, error, cosine, _), (_, _, _, recovered, _) = rows
    assert (size, exact) == ("32,768", ["0.000", "1.000"])
    assert int(small.replace(",", "")) < 16_384
    assert 0.3 < float(error) < 1
    assert float(cosine) + gain < float(recovered) < 1
