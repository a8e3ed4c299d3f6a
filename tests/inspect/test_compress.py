"""Compression of trained weights: it loses less of what they compute, keeps to its budget, and can be distilled."""

from __future__ import annotations

import copy
import math
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.cli import main
from slcompile.config import SLConfig
from slcompile.convert.drift import Drift
from slcompile.weight.sl_weight import SLWeight


class Net(nn.Module):
    """Three weights, of which one is a Conv1D-style parameter, on inputs of a steep spectrum, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(64, 96), nn.Dropout(0.5), nn.Linear(96, 64)
        self.mix = nn.Parameter(torch.randn(64, 48) / 8)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(64, 96) @ torch.diag(0.9 ** torch.arange(96.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(torch.relu(self.up(x)))) @ self.mix


def inputs(seed: int, batches: int = 4) -> list[Tensor]:
    """Of one distribution, different for each seed: [32, 64] each."""
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9))).Q
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 64, generator=generator) * 0.9 ** torch.arange(64.0) @ turn for _ in range(batches)]


def outputs_error(model: nn.Module, dense: nn.Module) -> float:
    x = torch.cat(inputs(7))
    with torch.no_grad():
        found, expected = model.eval()(x), dense.eval()(x)
    return float((found - expected).norm() / expected.norm())


CONFIG = SLConfig(rank=8, density=0.06, init="spectral", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("support", ["vector", "uniform", "largest"])
def test_it_loses_less_of_what_the_weights_compute_than_spectral_does(support):
    dense, plain, model = Net(), Net(), Net()
    config = SLConfig(**{**CONFIG.to_options(), "support": support, "vector": 16})
    slcompile.factorize_(plain, config, example_args=(inputs(1)[0],))
    found = slcompile.compress(model, inputs(1, 16), rank=8, config=config)
    assert set(found.weights) == {"up.weight", "down.weight", "mix"} == set(slcompile.factors(model))
    assert model.training
    assert model.drop.training
    assert outputs_error(model, dense) < 0.8 * outputs_error(plain, dense)
    # The error that is said is that of what the weight computes.
    x = torch.cat(inputs(1, 16))
    weights = {name: net.get_parameter("up.weight") if net is dense else net.up.weight
               for name, net in (("dense", dense), ("model", model))}  # fmt: skip
    expected = (x @ (weights["model"] - weights["dense"]).t()).norm() / (x @ weights["dense"].t()).norm()
    assert found.weights["up.weight"].error == pytest.approx(expected.item(), rel=0.02)  # damping is in it


def test_a_budget_is_spent_by_what_each_weight_loses():
    model = Net()
    found = slcompile.compress(model, inputs(1), budget=0.4, density=0.06)
    dense = {name: math.prod(each.shape) for name, each in found.weights.items()}
    assert 0.37 < found.share <= 0.4
    assert found.share == sum(each.parameters for each in found.weights.values()) / sum(dense.values())
    for name, weight in slcompile.factors(model).items():
        each = found.weights[name]
        assert each.rank == weight.A.shape[0]
        assert each.parameters == sum(part.numel() for part in (weight.B, weight.A, weight.values))
        assert each.parameters == SLWeight.size(each.shape, SLConfig(rank=each.rank, density=0.06, support="largest"))
    assert "of the parameters of 3 weights are left" in str(found)


class Branches(nn.Module):
    """Two weights of one kind, of which the second does little to the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.much, self.little = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.much(x) + 0.01 * self.little(x)


@pytest.mark.slow
def test_rank_goes_where_the_outputs_need_it():
    found = slcompile.compress(Branches(), inputs(1), budget=0.4, density=0.06)
    assert found.by_outputs
    much, little = found.weights.values()
    assert little.rank == 1
    assert much.rank > 15
    # Without a gradient each weight counts by what it computes itself.
    model = Branches()
    model.forward = lambda x: Branches.forward(model, x).argmax(-1)
    found = slcompile.compress(model, inputs(1), budget=0.4, density=0.06)
    assert not found.by_outputs
    much, little = found.weights.values()
    assert abs(much.rank - little.rank) <= 2
    assert "no gradient of the outputs came to some weights" in str(found)


@pytest.mark.slow
def test_fits_behind_approximated_weights_bring_the_outputs_nearer():
    dense, plain, model = Net(), Net(), Net()
    slcompile.compress(plain, inputs(1, 16), rank=4)
    found = slcompile.compress(model, inputs(1, 16), rank=4, refine=True)
    assert found.refined is not None
    before, after = found.refined
    assert after < 0.9 * before
    assert outputs_error(model, dense) < 0.97 * outputs_error(plain, dense)  # for inputs that it was not fitted to
    assert f"squared error of the outputs {before:.4f}, refined to {after:.4f}" in str(found)
    with torch.no_grad():
        target = [dense(x) for x in inputs(1, 16)]
        error = sum((model(x) - y).square().sum() for x, y in zip(inputs(1, 16), target, strict=True))
    assert after == pytest.approx(float(error / sum(y.square().sum() for y in target)), rel=1e-4)
    first = found.weights["up.weight"].error  # before it nothing was approximated: fitted as it was
    assert first == pytest.approx(slcompile.compress(Net(), inputs(1, 16), rank=4).weights["up.weight"].error, rel=1e-2)


@pytest.mark.slow
def test_a_refinement_that_does_not_lower_the_error_is_left(monkeypatch):
    plain, model = Net(), Net()
    slcompile.compress(plain, inputs(1), rank=4)
    monkeypatch.setattr(Drift, "corrected", lambda self, weight, input_dim: -weight)
    found = slcompile.compress(model, inputs(1), rank=4, refine=True)
    assert found.refined is not None
    assert found.refined[0] == found.refined[1]
    assert all(torch.equal(each, plain.state_dict()[name]) for name, each in model.state_dict().items())


@pytest.mark.slow
def test_a_distillation_brings_the_outputs_nearer():
    dense, model, other = Net(), Net(), Net()
    slcompile.compress(other, inputs(1, 16), rank=4)
    batches = ({"x": each} for each in inputs(1, 16))
    found = slcompile.compress(model, batches, rank=4, distill_steps=97, lr=1e-2)
    assert found.distilled is not None
    assert found.distilled[1] < 0.97 * found.distilled[0]  # of the first batch, which is the last again
    assert outputs_error(model, dense) < 0.97 * outputs_error(other, dense)
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in ("up.bias", "down.bias"))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_distillation_in_half_precision_takes_the_steps_of_float32(dtype):
    found = {}
    for each in (torch.float32, dtype):
        result = slcompile.compress(Net().to(each), inputs(1), rank=8, config=CONFIG, distill_steps=21, lr=1e-4)
        assert result.distilled is not None
        found[each] = result.distilled[0] / result.distilled[1]
    assert found[dtype] == pytest.approx(found[torch.float32], rel=0.01)


@pytest.mark.slow
def test_a_distillation_that_diverges_leaves_the_factors_from_before_it():
    model, other = Net(), Net()
    torch.manual_seed(1)
    slcompile.compress(other, inputs(1), rank=4)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match=r"the distillation's loss is .* take a lower lr than 1e\+30"):
        slcompile.compress(model, inputs(1), rank=4, distill_steps=20, lr=1e30)
    assert all(torch.equal(each, other.state_dict()[name]) for name, each in model.state_dict().items())


class Counting(Net):
    """It counts its calls, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_buffers_stay():
    model = Counting()
    handle = model.up.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match="carries a gradient hook"):
        slcompile.compress(model, inputs(1), rank=4, config=CONFIG)
    assert model.calls == 0
    handle.remove()
    slcompile.compress(model, inputs(1), rank=4, config=CONFIG, distill_steps=2)
    assert model.calls == 0


def test_the_random_state_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = Net()
    torch.manual_seed(5)
    slcompile.compress(model, inputs(1), rank=4, config=CONFIG)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either budget or rank, got budget=None and rank=None"),
        ({"rank": 4, "budget": 0.5}, "give either budget or rank, got budget=0.5 and rank=4"),
        ({"budget": 0.05}, r"budget=0\.05 cannot be met: rank 1 and density=0\.03 take 0\.0[0-9]+"),
        ({"budget": 1.5}, r"budget must be a number in \(0, 1\), got 1\.5"),
        ({"rank": 4, "distill_steps": -1}, "distill_steps must be an int >= 0, got -1"),
        ({"rank": 4, "refine": 1}, "refine must be True or False, got 1"),
        ({"rank": 4, "lr": 0}, "lr must be a finite number above 0, got 0"),
        ({"rank": 4, "calibration": []}, "calibration must have a batch, got none"),
        ({"rank": 4, "calibration": {"x": torch.ones(4, 64)}}, "calibration must be batches, got a mapping"),
        (
            {"rank": 4, "calibration": [torch.full((4, 64), math.nan)]},
            "calibration gives up.weight inputs or gradients with NaN or Inf",
        ),
        ({"rank": 4, "config": SLConfig(base="frozen")}, "compress approximates weights .* base='frozen'"),
        ({"rank": {"nothing*": 4}}, r"rank pattern 'nothing\*' matches no parameter"),
        ({"rank": 90}, "rank must be at most 64, the smaller side of the largest eligible weight, got 90"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(arguments, message):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    given: dict[str, Any] = {"calibration": inputs(1), **arguments}
    with pytest.raises(ValueError, match=message):
        slcompile.compress(net, **given)
    assert type(net.up) is nn.Linear
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    assert net.training


def test_a_weight_that_no_input_reaches_is_named():
    with pytest.raises(ValueError, match=r"reaches no matmul of lone\.weight: give batches that do, or leave it out"):
        slcompile.compress(Lone(), inputs(1), rank=4)
    assert slcompile.compress(Lone(), inputs(1), rank=4, config=SLConfig(exclude="lone*")).weights.keys() == {
        "up.weight"
    }


class Lone(nn.Module):
    """A weight that a product reads while Dynamo traces, and an op of its own otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.lone = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.lone(x) if torch.compiler.is_compiling() else x


class Apart(Net):
    """A part of it runs in Python and is in no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.python = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.compiler.disable(self.python)(x))


def test_a_layer_that_is_in_no_graph_is_named(caplog):
    found = slcompile.compress(Apart(), inputs(1), rank=4)
    assert found.weights.keys() == {"up.weight", "down.weight", "mix"}
    assert "no captured graph of the examples reads python.weight: left dense" in caplog.text
    caplog.clear()
    slcompile.compress(Apart(), inputs(1), rank=4, config=SLConfig(exclude="python*"))
    slcompile.factorize_(Apart(), SLConfig(rank=4))  # without examples: by the types of its modules, this one's, too
    assert "no captured graph" not in caplog.text
    slcompile.factorize_(Apart(), SLConfig(rank=4), example_args=inputs(1)[0])
    assert "no captured graph of the examples reads python.weight: left dense" in caplog.text


@pytest.mark.slow
def test_the_command_writes_factors_and_dense_weights(tmp_path, monkeypatch, capsys):
    name = f"compressed_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom transformers import GPT2Config, GPT2LMHeadModel\n\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32)\n"
        "    return GPT2LMHeadModel(config)\n\n"
        "def batches():\n"
        "    for _ in range(3):\n"
        "        yield {'input_ids': torch.randint(0, 128, (2, 16)), 'use_cache': False}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["compress", f"{name}:model", "--calibration", f"{name}:batches", "--budget", "0.5", "--density", "0.1"]
    assert main([*command, "--distill-steps", "2", "--out", "factors", "--merged", "dense"]) == 0
    printed = capsys.readouterr().out
    assert "of the parameters of 4 weights are left" in printed
    assert "distilled to" in printed

    from transformers import GPT2LMHeadModel

    ids = torch.arange(32).reshape(2, 16)
    loaded, dense = slcompile.load_factorized(tmp_path / "factors"), GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    assert loaded.transformer.h[0].mlp.c_fc.weight_sl.support == "largest"
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, dense.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert main(command) == 2
    assert "give --out DIR, --merged DIR, or both" in capsys.readouterr().err
    assert main([*command[:2], "--calibration", "batches", *command[4:], "--out", "factors"]) == 2
    assert "calibration batches are given as PACKAGE.MODULE:FUNCTION, got 'batches'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_s_example_runs_as_it_stands(capsys):
    page = (Path(slcompile.__file__).parents[1] / "docs" / "compress.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"run by tests/inspect/test_compress.py -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "compress.md", "exec"), {})
    assert "of the parameters of 2 weights are left" in capsys.readouterr().out


class Encoding(UserDict[str, Tensor]):
    """As transformers' BatchEncoding: a mapping that is no dict."""


@pytest.mark.parametrize("where", ["around it", "in the model"])
def test_autocast_hides_no_weight(where):
    other, model, autocast = Net(), Net().eval(), torch.autocast("cpu", torch.bfloat16)
    state = torch.get_rng_state()
    expected = slcompile.compress(other, inputs(0), rank=8, config=CONFIG, refine=True)
    torch.set_rng_state(state)
    if where == "in the model":
        model.forward = autocast(model.forward)
        found = slcompile.compress(model, inputs(0), rank=8, config=CONFIG, refine=True)
    else:
        with autocast:
            model(inputs(0)[0]).sum()  # which leaves casts of the weights in its cache
            found = slcompile.compress(model, inputs(0), rank=8, config=CONFIG, refine=True)
    for name, each in found.weights.items():
        assert each.error == pytest.approx(expected.weights[name].error, rel=0.02)
    assert found.refined == pytest.approx(expected.refined, rel=0.05)


def test_mappings_that_are_no_dicts_are_arguments_too():
    model, again = Net().bfloat16(), Net().bfloat16()
    slcompile.compress(model, [{"x": x} for x in inputs(0)], rank=8, density=0.05)
    slcompile.compress(again, [Encoding(x=x) for x in inputs(0)], rank=8, density=0.05)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_model_that_runs_without_gradients_is_compressed_by_what_its_weights_compute(mode):
    model = Net()
    model.forward = mode()(model.forward)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="distill_steps needs a model that runs with gradients"):
        slcompile.compress(model, inputs(0), rank=8, density=0.05, distill_steps=2)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    found = slcompile.compress(model, inputs(0), rank=8, density=0.05)
    assert not found.by_outputs
    assert set(found.weights) == {"up.weight", "down.weight", "mix"}


def test_a_weight_that_is_zero_loses_nothing_and_can_be_trained_further():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(model[1].weight)
    found = slcompile.compress(model, inputs(1, 2), rank=8)
    assert found.weights["1.weight"].error == 0
    assert 0 < found.weights["0.weight"].error < 1
    model(inputs(1)[0]).sum().backward()
    assert not model[1].weight.any()
    assert model[1].weight_sl.B.grad.any()


class Padded(nn.Module):
    """An encoder of torch's own layers, of which each is one op in inference, and padding is zero behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(64, 64)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.last(self.encoder(x, src_key_padding_mask=padding))


def test_torch_s_own_layers_are_compressed_and_distilled_as_they_train():
    padding = torch.arange(8).ge(5).expand(4, 8)
    batches = [(each.view(4, 8, 64), padding) for each in inputs(1)]
    found = slcompile.compress(Padded(), batches, rank=16, density=0.05, refine=True, distill_steps=1)
    assert len(found.weights) == 5
    assert found.distilled is not None
    assert found.distilled[0] < 0.1  # against zeros where padding is, 0.6
    assert torch.backends.mha.get_fastpath_enabled()


def test_torch_s_own_layers_are_found_in_inference():
    model = Padded().eval()
    slcompile.factorize_(model, CONFIG, example_args=(inputs(1)[0].view(4, 8, 64), torch.zeros(4, 8).bool()))
    assert len(slcompile.factors(model)) == 5


class Kinds(nn.Module):
    """A weight for each kind of input; no batch reaches both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far, self.last = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, *, is_far: bool = False) -> Tensor:
        return self.last(torch.relu((self.far if is_far else self.near)(x)))


def test_weights_that_later_batches_reach_are_compressed_too():
    batches = [{"x": x[: 16 + index], "is_far": index % 2 == 1} for index, x in enumerate(inputs(1))]
    found = slcompile.compress(Kinds(), batches, rank=8)
    assert found.weights.keys() == {"near.weight", "far.weight", "last.weight"}
