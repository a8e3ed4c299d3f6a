"""Fine-tuning of a tiny random BERT: both tables, with peft as the base of the ratios."""

from __future__ import annotations

import math
import re
import sys

import pytest

from tests.testing import example

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("aten_kernels")]


def test_each_method_learns_which_text_a_passage_is_from(tiny_bert, monkeypatch, capsys):
    source, texts = tiny_bert
    finetune = example("finetune")
    sizes = "--steps 40 --batch 32 --tokens 16 --passages 60 --rank 4 --runs 3"
    given = f"{sizes} --seeds 0 --lr 1e-2 --head-lr 3e-2 --model {source} --text".split()
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given, *map(str, texts)])
    monkeypatch.setenv("COLUMNS", "160")
    finetune.main()
    rows = re.findall(r"│ (peft LoRA|frozen|frozen, mixed) +│([^\n]*)│\n", capsys.readouterr().out)
    (peft, learned), (_, frozen), (_, mixed), (again, step), *timed = rows
    assert peft == again == "peft LoRA"
    cells = [[float(each.replace(",", "")) for each in row.split("│")] for row in (learned, frozen, mixed)]
    (size, rate, loss, one), (same_size, *_, ratio), (_, _, mixed_loss, _) = cells
    assert (size, rate, one) == (same_size, 1e-2, 1)
    assert ratio == pytest.approx(cells[1][2] / loss, abs=1e-3)
    assert all(each < 0.98 * math.log(5) for each in (loss, cells[1][2], mixed_loss)), cells  # of a guess
    assert len(timed) == 2
    assert all(float(each) > 0 for row in (step, *(row for _, row in timed)) for each in row.split("│"))


def test_as_many_held_out_passages_as_there_are_are_refused(tiny_bert, monkeypatch, capsys):
    source, texts = tiny_bert
    given = ["finetune.py", "--passages", "100000", "--model", str(source), "--text", *map(str, texts)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="2"):
        example("finetune").main()
    assert "--passages must leave some of the" in capsys.readouterr().err
