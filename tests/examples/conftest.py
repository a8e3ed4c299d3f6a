"""What several examples are run with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel


@pytest.fixture
def tiny_bert(tmp_path) -> tuple[Path, list[Path]]:
    """The folder of a random BERT of one layer with its tokenizer, and five texts."""
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
    return tmp_path, texts
