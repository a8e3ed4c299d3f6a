"""The recovery, of a BERT of one layer that is no better than random: what is measured, and that training helps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "recover.py"
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "gain"),  # what is compressed for its inputs has lost little
    [("--rank 0.25", 0.02), ("--budget 0.15 --density 0.02 --calibration 64 --moves 10", 0.001)],
)
def test_a_short_training_recovers_some_of_what_the_approximation_lost(how, gain, tmp_path):
    source = Path(torch.nn.functional.__file__).read_text()
    texts = [tmp_path / f"{index}.txt" for index in range(5)]
    for index, text in enumerate(texts):
        text.write_text(source[20_000 * index : 20_000 * (index + 1)])
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train(
        [*map(str, texts)], trainers.WordLevelTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=200, initializer_range=0.2, **shape)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    flags = f"--steps 30 {how} --batch 8 --tokens 16 --passages 20".split()
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path), "--text", *map(str, texts), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"(dense|before|after) .*?([\d,]+) .*?(\d\.\d+) .*?(\d\.\d+) .*?([\d.]+)%", done.stdout)
    (_, size, *exact, _), (_, small, error, cosine, _), (_, _, _, recovered, _) = rows
    assert (size, exact) == ("32,768", ["0.000", "1.000"])
    assert int(small.replace(",", "")) < 16_384
    assert 0.3 < float(error) < 1
    assert float(cosine) + gain < float(recovered) < 1
