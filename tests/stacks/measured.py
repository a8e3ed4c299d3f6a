"""What torchrun starts for ``tests/memory/test_many.py``: a small model measured as examples/many_processes.py does."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import ranks
import torch.distributed as dist

import slcompile

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import many_processes as example
from transformers import LlamaConfig

CONFIG = slcompile.SLConfig(rank=64, density=0.05, seed=0)
SHAPE = (2, 32)


def llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=1000,
        tie_word_embeddings=False,
    )


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Each way and kind: bytes sent, bytes of parameters, gradients and states, and the peak; estimated and real."""
    found = {}
    for way in example.WAYS:
        estimates = example.estimated(llama(), CONFIG, way, *SHAPE)
        for kind, sl in (("dense", None), ("sltrain", CONFIG)):
            if (way, kind) == ("ddp", "dense"):
                continue  # what it would show, the others do
            share = estimates[kind]
            gc.collect()  # what another model keeps of its supports would count
            run = example.Run(llama(), sl, way, *SHAPE)
            run.step()
            run.step()
            held = run.held()
            found[f"{way} {kind}"] = {
                "peak": [share.peak, sum(held.values()) + example.peak_above(run.step)],
                "sent": [example.over_gloo(share), run.sent()],
                **{name: [share.at_peak[name], size] for name, size in held.items()},
            }
            del run
    assert dist.get_world_size() == 2
    return found


if __name__ == "__main__":
    ranks.main(globals())
