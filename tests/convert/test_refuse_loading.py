from __future__ import annotations

import subprocess
import sys

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


def broken(state, kind):
    """A state dict of factors with one entry that cannot be loaded."""
    changes = {
        "shape": ("up.bias", state["up.bias"][:-1]),
        "transposed factor": ("up.weight_sl.B", state["up.weight_sl.B"].t()),
        "no tensor": ("down.weight_sl.values", 3.0),
        "integers": ("up.weight_sl.A", state["up.weight_sl.A"].to(torch.int8)),
        "floating positions": ("up.weight_sl.index", state["up.weight_sl.index"].float()),
        "positions outside": ("up.weight_sl.index", state["up.weight_sl.index"] + 96 * 64),
        "positions twice": ("up.weight_sl.index", state["up.weight_sl.index"] // 2),
        "sparse": ("mix", state["mix"].to_sparse()),
        "meta": ("up.bias", state["up.bias"].to("meta")),
    }
    name, value = changes[kind]
    return {**state, name: value}


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["shape", "transposed factor", "no tensor", "integers", "floating positions", "positions outside",
     "positions twice", "sparse", "meta"],
)  # fmt: skip
def test_a_broken_entry_is_refused_before_anything_is_loaded(kind, strict, block, block_class):
    config = slcompile.SLConfig(rank=8, density=0.05, support="uniform")
    twin = block_class()
    for each in (block, twin):
        slcompile.factorize_(each, config)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"in loading state_dict for \w*Block; nothing was loaded"):
        block.load_state_dict(broken(twin.state_dict(), kind), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_missing_or_strange_name_is_refused_before_anything_is_loaded(block, block_class):
    twin = block_class()
    for each in (block, twin):
        slcompile.factorize_(each, CONFIG)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    state = twin.state_dict()
    del state["up.bias"]
    with pytest.raises(RuntimeError, match=r"nothing was loaded:\s*up\.bias is missing\s*strange is unexpected$"):
        block.load_state_dict({**state, "strange": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert block.load_state_dict(state, strict=False).missing_keys == ["up.bias"]


@pytest.mark.slow
def test_loading_is_watched_without_the_backend():
    """In a process that factorizes, and compiles nothing."""
    code = (
        "import torch, slcompile\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "state = slcompile.factorize_(torch.nn.Sequential(torch.nn.Linear(64, 64))).state_dict()\n"
        "try:\n    model.load_state_dict(state, strict=False)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the state dict holds the factors of 0.weight, dense in this Sequential" in done.stdout


def test_a_hook_that_forgives_what_is_missing_is_heard(block, block_class):
    for module in (block, twin := block_class()):
        slcompile.factorize_(module, CONFIG)
    block.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
    state = twin.state_dict()
    del state["up.bias"]
    block.load_state_dict(state)
    assert torch.equal(block.up.weight, twin.up.weight)


@pytest.mark.parametrize(
    ("support", "place"), [("stratified", "seed"), ("vector", "seed"), ("uniform", "index"), ("uniform", "seed")]
)
def test_values_and_where_they_are_come_together_or_not_at_all(block_class, support, place):
    config = slcompile.SLConfig(rank=8, density=0.05, support=support)
    model, other = (slcompile.factorize_(block_class(), config) for _ in range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prefix = "up.weight_sl."
    sparse = {name: each for name, each in other.state_dict().items() if name.startswith(prefix)}
    for left_out in (prefix + place, prefix + "values"):
        given = {name: each for name, each in sparse.items() if name != left_out}
        with pytest.raises(RuntimeError, match=r"up\.weight_sl\.(values|seed|index) comes without up\.weight_sl\."):
            model.load_state_dict(given, strict=False)
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    model.load_state_dict(sparse, strict=False)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in sparse.items())


@pytest.mark.parametrize("seed", [-1, 1 << 24, 1 << 40])
def test_a_seed_that_kernels_would_read_otherwise_is_refused(block_class, seed):
    model = slcompile.factorize_(block_class(), CONFIG)
    state = model.state_dict() | {"up.weight_sl.seed": torch.tensor([seed])}
    with pytest.raises(RuntimeError, match=rf"up\.weight_sl\.seed must lie in \[0, 16777216\), got \[{seed}\]"):
        model.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_factors_of_another_alpha_are_refused(strict, inside, block_class, tmp_path):
    """No tensor tells the scale: the same factors would compose another weight."""
    of_32, of_16 = (
        slcompile.factorize_(block_class(), slcompile.SLConfig(rank=8, density=0.05, alpha=alpha)) for alpha in (32, 16)
    )
    torch.save(of_16.state_dict(), tmp_path / "factors.pt")
    state = torch.load(tmp_path / "factors.pt")
    before = {name: value.clone() for name, value in of_32.state_dict().items()}
    part = of_32.up.weight_sl
    model, given = (of_32, state) if inside else (part, of_16.up.weight_sl.state_dict())
    message = r"has a scale \(alpha / rank\) of 4, in the state dict 2: factorize with the alpha of the training"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(given, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in of_32.state_dict().items())
    of_32.load_state_dict(dict(state), strict=strict)  # which does not tell


def test_parts_that_a_weight_does_not_have_are_refused_where_loading_is_not_strict(block, block_class):
    """A base that is left out would leave what was added to it."""
    state = dict(slcompile.factorize_(block_class(), slcompile.SLConfig(rank=8, base="frozen")).state_dict())
    slcompile.factorize_(block, slcompile.SLConfig(rank=8))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"up\.weight_sl\.base is no part of SLWeight\(96x64, rank=8.*other options"):
        block.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_the_trained_parts_alone_are_loaded_beside_a_base(block, block_class):
    config = slcompile.SLConfig(rank=8, density=0, base="frozen")
    for each in (block, twin := block_class()):
        slcompile.factorize_(each, config)
    trained = {name: each for name, each in twin.named_parameters() if each.requires_grad}
    assert set(block.load_state_dict(trained, strict=False).missing_keys) == {
        "up.weight_sl.base",
        "down.weight_sl.base",
    }
