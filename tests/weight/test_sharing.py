"""Weights that share CP factors: what is trained, what is stored, what stays shared, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
import slcompile.integrations.transformers
from slcompile.config import SLConfig
from slcompile.weight import CPWeight
from slcompile.weight.sharing import sharing
from tests.zoo import tiny

OPTIONS: dict[str, Any] = {"structure": "cp", "rank": 4, "blocks": 8, "base": "frozen"}


class Layers(nn.Module):
    """Three square weights and two of another shape, which are read in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(64, 96, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.square
        x = torch.tanh(second(torch.tanh(first(x))))
        return self.up[0](x) * torch.tanh(self.up[1](torch.tanh(third(x))))


def weights(model: nn.Module) -> dict[str, CPWeight]:
    return {name: each for name, each in model.named_modules() if isinstance(each, CPWeight)}


def shared(**more: Any) -> nn.Module:
    """With every trained part random."""
    model = slcompile.share_factors(slcompile.factorize_(Layers(), SLConfig(**{**OPTIONS, **more})))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith((".A", ".B", ".C")):
                each.normal_(std=0.3)
    return model


def assert_shared(model: nn.Module) -> None:
    each = list(weights(model).values())
    assert len({id(weight.B) for weight in each}) == len({id(weight.A) for weight in each}) == 2
    assert len({id(weight.C) for weight in each}) == 5
    for weight in each:
        weight.check_support()


@pytest.mark.parametrize("base", ["frozen", "nf4"])
def test_the_start_stays_and_the_optimizer_has_each_factor_once(base):
    model = slcompile.factorize_(Layers().requires_grad_(False), SLConfig(**{**OPTIONS, "base": base}))
    x = torch.randn(8, 64)
    before, trained = model(x).detach(), sum(each.numel() for each in model.parameters() if each.requires_grad)
    slcompile.share_factors(model)
    assert torch.equal(model(x), before)
    assert_shared(model)
    found = [each for each in model.parameters() if each.requires_grad]
    # C of each; B [8, 4] and A of the squares, B [12, 4] and A of the others.
    assert sum(each.numel() for each in found) == 5 * 8 * 4 + 4 * (8 + 64) + 4 * (12 + 64) < 0.5 * trained
    optimizer = torch.optim.AdamW(found, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(x) - torch.roll(before, 1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert len(optimizer.state) == 5 + 4
    assert_shared(model)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_compiled_gradients_are_those_of_float64_summed_over_the_weights(assert_eager, lowering):
    model, x = shared(), torch.randn(16, 64)
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "lowering": lowering})
    assert_eager(compiled, model, [x])
    compiled(x).square().sum().backward()
    found = model.square[0].weight_sl.B.grad

    double = copy.deepcopy(model).double()
    parts = {name: [each.detach().requires_grad_() for each in (w.C, w.B, w.A)] for name, w in weights(double).items()}
    dense = {}
    for name, weight in weights(double).items():
        product = torch.einsum("hr,ir,rj->hij", *parts[name]).view(weight.shape)
        dense[name.replace("weight_sl", "weight")] = weight.base + weight.scale * product
    dense |= {f"square.{index}.bias": layer.bias for index, layer in enumerate(double.square)}
    torch.func.functional_call(Layers().double(), dense, x.double()).square().sum().backward()
    wanted = sum(parts[f"square.{index}.weight_sl"][1].grad for index in range(3))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_copies_states_and_merging(tmp_path):
    model, x = shared(), torch.randn(4, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_shared(twin)
        assert torch.equal(twin(x), model(x))
    other = shared()
    other.load_state_dict(model.state_dict())
    assert_shared(other)
    assert torch.equal(other(x), model(x))
    assert len(list(other.double().parameters())) == len(list(model.parameters()))
    merged = slcompile.merged_state_dict(model)
    torch.testing.assert_close(slcompile.merge_(copy.deepcopy(model))(x), model(x))
    dense = Layers()
    dense.load_state_dict(dict(merged))
    torch.testing.assert_close(dense(x), model(x))


def test_what_is_shared_no_more_is_neither_saved_nor_merged_and_can_be_shared_again():
    model, x = shared(), torch.randn(4, 64)
    before = model(x)
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    for attempt in (model.state_dict, lambda: slcompile.merge_(model)):
        with pytest.raises(RuntimeError, match="B and A were shared with another weight and are no more"):
            attempt()
    slcompile.share_factors(model)  # they are equal
    assert_shared(model)
    assert torch.equal(model(x), before)
    assert model.state_dict()


def test_checkpoints_hold_each_factor_once_and_bring_the_sharing(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = tiny("llama").eval()
    slcompile.share_factors(slcompile.factorize_(model, SLConfig(**{**OPTIONS, "blocks": 4, "min_dim": 16})))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith((".A", ".B", ".C")):
                each.normal_(std=0.3)
    ids = torch.arange(22).view(2, 11)
    slcompile.save_factorized(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    kinds = len({id(each.B) for each in weights(model).values()})
    assert sum(name.endswith("_sl.B") for name in names) == kinds < len(weights(model))
    for loaded in (slcompile.load_factorized(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
        assert sharing(loaded) == sharing(model)
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
    broken = (tmp_path / "slcompile.json").read_text().replace('"shares": "model.layers.0', '"shares": "model.layers.7')
    Path(tmp_path / "slcompile.json").write_text(broken)
    with pytest.raises(ValueError, match=r"cannot share factors with 'model\.layers\.7"):
        slcompile.load_factorized(tmp_path)


def test_what_would_change_the_model_is_refused_before_anything_changes():
    model = slcompile.factorize_(Layers(), SLConfig(**OPTIONS))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 64)).square().sum().backward()
    early.step()
    early.zero_grad()
    before = [id(each) for each in model.parameters()]
    random = slcompile.factorize_(Layers(), SLConfig(**{**OPTIONS, "base": None}))
    with torch.device("meta"):
        empty = slcompile.factorize_(Layers(), SLConfig(**OPTIONS))
    with pytest.raises(ValueError, match=r"the factors of square\.0\.weight and square\.1\.weight differ"):
        slcompile.share_factors(model)
    with pytest.raises(ValueError, match="call share_factors before training"):
        slcompile.share_factors(random)
    with pytest.raises(ValueError, match=r"the factors of square\.0\.weight are on the meta device"):
        slcompile.share_factors(empty)
    assert [id(each) for each in model.parameters()] == before
    for other in (slcompile.factorize_(Layers(), SLConfig(rank=4)), Layers()):
        with pytest.raises(ValueError, match="model has no two weights that can share factors"):
            slcompile.share_factors(other)


def test_an_optimizer_that_was_made_before_says_so():
    model = slcompile.factorize_(Layers(), SLConfig(**OPTIONS))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    slcompile.share_factors(model)
    with pytest.raises(RuntimeError, match=r"square\.1\.weight shares the factors of square\.0\.weight .*again"):
        early.step()


def test_merging_a_part_leaves_the_rest_in_training() -> None:
    torch.manual_seed(0)
    model = slcompile.share_factors(slcompile.factorize_(Layers(), SLConfig(**OPTIONS)))
    slcompile.merge_(model.square[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.square[1].weight_sl.B.detach().clone()
    for _ in range(2):  # B or C is zero at first
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.square[1].weight_sl.B, before) or not torch.equal(model.square[1].weight_sl.A, before)
    slcompile.merge_(model)
    with pytest.raises(RuntimeError, match="was merged"):
        optimizer.step()
