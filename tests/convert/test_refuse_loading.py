from __future__ import annotations

import pytest
import torch

import slcompile
from tests.testing import CONFIG


@pytest.mark.parametrize("strict", [True, False])
def test_factors_that_meet_a_dense_model_are_refused_and_change_nothing(block, block_class, strict):
    state = slcompile.factorize_(block_class(), CONFIG).state_dict()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the factors of up\.weight and 1 more, dense in this Block: .*factorize_"):
        block.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=r"the factors of weight, dense in this Linear"):
        block.up.load_state_dict({"weight_sl.values": torch.zeros(1)}, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_dense_weights_that_meet_a_factorized_model_are_refused(block, block_class, strict):
    slcompile.factorize_(block, CONFIG)
    with pytest.raises(RuntimeError, match=r"dense weights for up\.weight and 1 more, factorized in this Block"):
        block.load_state_dict(block_class().state_dict(), strict=strict)


def test_what_fits_loads_in_part_as_ever(block, block_class):
    twin = block_class()
    assert block.load_state_dict({"mix": twin.mix}, strict=False).unexpected_keys == []
    assert torch.equal(block.mix, twin.mix)
    for module in (block, twin):
        slcompile.factorize_(module, CONFIG)
    part = {name: value for name, value in twin.state_dict().items() if name.startswith("up.")}
    assert block.load_state_dict(part, strict=False).unexpected_keys == []
    assert torch.equal(block.up.weight, twin.up.weight)
    with pytest.raises(TypeError, match="state_dict"):
        block.load_state_dict(7)
