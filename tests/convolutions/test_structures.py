"""Every structure for the weights of convolutions, and how it starts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slcompile
from slcompile.health import composed_by_formula
from tests.convolutions.models import CONFIG, IMAGES, OPTIONS, SHAPES, STRUCTURES, Small, require_near, results
from tests.testing import randomize


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_sees_a_matrix_and_gives_back_the_kernel(structure: str) -> None:
    options = {**OPTIONS, **STRUCTURES[structure]}
    if "structure" in options:
        del options["density"]
    torch.manual_seed(0)
    model = Small()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    y = model(IMAGES)
    slcompile.factorize_(model, slcompile.SLConfig(**options))
    assert {
        name: tuple(each.shape) for name, each in slcompile.merged_state_dict(model).items() if name in SHAPES
    } == SHAPES
    if structure == "frozen":
        torch.testing.assert_close(model(IMAGES), y)
        assert torch.equal(model.wide.weight_sl.base, before["wide.weight"].flatten(1))
    randomize(model, 0.1)
    wide = composed_by_formula(copy.deepcopy(model).double())
    require_near(results(model, model, IMAGES)[:1], results(wide, wide, IMAGES.double())[:1])
    again = copy.deepcopy(model)
    fresh = Small()
    slcompile.factorize_(fresh, slcompile.SLConfig(**options))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(IMAGES), model(IMAGES))
    slcompile.merge_(model)
    assert {name: tuple(each.shape) for name, each in model.named_parameters() if name in SHAPES} == SHAPES
    torch.testing.assert_close(model(IMAGES), again(IMAGES), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(before)


def test_reset_and_spectral_start() -> None:
    torch.manual_seed(0)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    model.wide.reset_parameters()
    weight = model.wide.weight_sl
    assert not weight.B.any()
    assert 0.9 < float(weight.A.abs().max()) * 72**0.5 <= 1  # the fan-in is that of patches
    low = torch.randn(32, 4) @ torch.randn(4, 72)
    with torch.no_grad():
        other = Small()
        other.wide.weight.copy_(low.view(32, 8, 3, 3))
    slcompile.factorize_(other, slcompile.SLConfig(**OPTIONS, init="spectral"))
    torch.testing.assert_close(other.wide.weight.flatten(1), low, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compress_fits_kernels_to_the_patches_that_they_read() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(8, 3)  # channels that follow from three
    batches = [torch.einsum("oi,bihw->bohw", mixing, torch.randn(4, 3, 7, 9)) for _ in range(3)]
    plain = slcompile.factorize_(copy.deepcopy(model := Small()), slcompile.SLConfig(**OPTIONS, init="spectral"))
    wanted = [model(batch) for batch in batches]
    config = slcompile.SLConfig(**{**OPTIONS, "support": "largest"})
    found = slcompile.compress(model, batches, rank=6, config=config)
    assert {name: each.shape for name, each in found.weights.items()} == SHAPES

    def error(of: nn.Module) -> float:
        return sum(float((of(batch) - y).square().sum()) for batch, y in zip(batches, wanted, strict=True))

    assert error(model) < error(plain) / 2
    # Every patch is of 3 channels' numbers, of which there are 27.
    assert found.weights["wide.weight"].error < 0.9
    budget = slcompile.compress(Small(), batches, budget=0.5, config=config)
    assert 0.4 < budget.share <= 0.5
    suggested = slcompile.suggest(Small(), 0.5, slcompile.SLConfig(**OPTIONS))
    assert {name: each.shape for name, each in suggested.weights.items()} == SHAPES
