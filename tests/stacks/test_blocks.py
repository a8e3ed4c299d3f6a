"""Compiling block by block with ``fullgraph=True``, as torchtitan does: options are given to ``factorize_`` before."""

from __future__ import annotations

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import slcompile
from tests.testing import some_of

pytestmark = pytest.mark.slow


def trained(model: torch.nn.Module) -> list[float]:
    return ranks.train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), range(2))


@pytest.mark.parametrize("checkpointed", some_of([False, True], [True]), ids=["plain", "checkpointed"])
def test_equal_blocks_compile_once_and_train_as_eager_does(tmp_path, counting, checkpointed):
    config = slcompile.SLConfig(rank=8, density=0.05, seed=1)
    torch.manual_seed(0)
    model = ranks.transformer(layers=6)
    if checkpointed:
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer)
    slcompile.factorize_(model, config)
    for layer in model.layers:
        layer.compile(backend=counting, fullgraph=True, options=ranks.LIGHT)
    losses = trained(model)
    assert counting.calls == 1

    torch.manual_seed(0)
    eager = slcompile.factorize_(ranks.transformer(layers=6), config)
    assert losses == pytest.approx(trained(eager), rel=1e-9)
    assert list(slcompile.factors(model)) == list(slcompile.factors(eager))
    # The wrapper is no part of a name: not in a merged state dict, nor in a file.
    merged = slcompile.merged_state_dict(model)
    assert set(merged) == set(ranks.transformer(layers=6).state_dict())
    saved = load_file(slcompile.save_merged(model, tmp_path / "dense") / "model.safetensors")
    for name, value in merged.items():
        torch.testing.assert_close(saved[name], value)
