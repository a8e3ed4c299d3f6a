"""Trains small transformers models with what is installed, as a user would: ``python tests/trains.py``.

Imports nothing of the tests, so that it runs against an installed wheel, with any version of transformers.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from importlib.metadata import version

import torch
import transformers

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, vocab_size=128, max_position_embeddings=64),
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
STEPS = 12


def train(name: str) -> str:
    """Trains one model; returns a line of what was seen.

    Raises:
        AssertionError: The loss does not fall, compiled is not eager, or a checkpoint brings back another model.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, backend="sltrain", options={"rank": 8, "density": 0.05})
    ids = torch.randint(128, (4, 16))
    losses = []
    for _ in range(STEPS):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    import slcompile

    weights = slcompile.factors(model)
    assert len(weights) >= 8, list(weights)
    assert losses[-1] < losses[0] - 0.3, losses
    with torch.no_grad():
        eager = copy.deepcopy(model)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, eager, rtol=1e-4, atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        slcompile.save_factorized(model, f"{folder}/factors")
        again = slcompile.load_factorized(f"{folder}/factors")
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    slcompile.merge_(model)
    assert not slcompile.factors(model)
    return f"{name}: {len(weights)} weights, loss {losses[0]:.2f} -> {losses[-1]:.2f}"


if __name__ == "__main__":
    import slcompile

    packages = {each: version(each) for each in ("slcompile", "torch", "transformers")}
    print(f"python {sys.version.split()[0]}, {packages}, {slcompile.__file__}")
    for each in CONFIGS:
        print(train(each))
