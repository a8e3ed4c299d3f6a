"""8- and 4-bit optimizers of torchao and bitsandbytes on factors, also per layer, beside float32 AdamW."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.optim import per_layer
from tests.testing import LITE
from tests.zoo import tiny

pytestmark = pytest.mark.slow

VOCABULARY, STEPS = 256, 60


def llama(seed: int = 0) -> nn.Module:
    """Small, with few shapes (torchao compiles once for each), its factors large enough for 8-bit states (4096)."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return tiny("llama", **sizes)


def sentences() -> list[Tensor]:
    """Batches [8, 32] of a random walk: each token has four successors, so the loss can fall from 5.5 to 1.4 nats."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    batches = []
    for _ in range(STEPS):
        tokens = [torch.randint(0, VOCABULARY, (8,), generator=generator)]
        for _ in range(31):
            tokens.append(successors[tokens[-1], torch.randint(0, 4, (8,), generator=generator)])
        batches.append(torch.stack(tokens, dim=1))
    return batches


def curve(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def low_bit(library: str, bits: int = 8) -> type[torch.optim.Optimizer]:
    module = pytest.importorskip(f"{library}.optim", reason='needs pip install "slcompile[optim]"')
    return getattr(module, f"AdamW{bits}bit")


def is_low_bit(state: dict, bits: int = 8) -> bool:
    """Whether a parameter's two moments take so many bits a number (bitsandbytes; torchao)."""
    moments = [state[name] for name in ("state1", "state2") if name in state]
    if moments:
        return all(each.dtype == torch.uint8 for each in moments)
    return all(type(state[name]).__name__ == f"OptimState{bits}bit" for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.long
@pytest.mark.parametrize(("library", "bits"), [("bitsandbytes", 8), ("torchao", 8), ("torchao", 4)])
def test_states_of_few_bits_learn_as_float32_adamw_does(library, bits):
    """Plain and per layer; per layer gives the plain library's weights, bit for bit."""
    cls = low_bit(library, bits)
    config = slcompile.SLConfig(rank=32, density=0.1)
    hyper = {"lr": 3e-3, "weight_decay": 0.01}
    curves, models = {}, {}
    for name, make in (
        ("AdamW", torch.optim.AdamW),
        (library, cls),
        (f"{library} per layer", lambda params, **kw: per_layer(cls, params, **kw)),
    ):
        model = slcompile.factorize_(llama(), config)
        optimizer = make(model.parameters(), **hyper)
        curves[name], models[name] = curve(model, optimizer, sentences()), model
        if name != "AdamW":
            for module in model.modules():
                if isinstance(module, slcompile.SLWeight):
                    assert all(is_low_bit(optimizer.state[p], bits) for p in (module.B, module.A, module.values))
    final = {name: sum(losses[-10:]) / 10 for name, losses in curves.items()}
    for name, losses in curves.items():
        print(f"{name:24}", *(f"{each:.3f}" for each in losses[9::10]), f"mean of the last ten {final[name]:.4f}")
    assert final["AdamW"] < 2.5 < curves["AdamW"][0]
    assert abs(final[library] - final["AdamW"]) <= 0.05
    assert curves[f"{library} per layer"] == curves[library]
    weights, per_layer_weights = (models[each].state_dict() for each in (library, f"{library} per layer"))
    assert weights.keys() == per_layer_weights.keys()
    assert all(torch.equal(each, per_layer_weights[name]) for name, each in weights.items())


@pytest.mark.parametrize("library", ["bitsandbytes", pytest.param("torchao", marks=pytest.mark.long)])
def test_eight_bit_states_of_factors_that_the_first_step_makes(library, tmp_path):
    """Adoption, and a state dict that goes through a file into the plain class of the library."""
    cls = low_bit(library)
    model = llama()
    model.compile(backend="sltrain", options={"rank": 32, "density": 0.1, **LITE})
    optimizer = per_layer(cls, model.parameters(), lr=3e-3)
    batches = sentences()[:4]
    losses = curve(model, optimizer, batches[:2])
    weight = model.model.layers[1].mlp.up_proj.weight_sl
    assert all(is_low_bit(optimizer.state[p]) for p in weight.parameters())
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's tensors warn about TypedStorage when they are read
        weights, state = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = slcompile.factorize_(llama(seed=1), slcompile.SLConfig(rank=32, density=0.1))
    resumed.load_state_dict(weights)
    plain = cls(resumed.parameters(), lr=1.0)
    plain.load_state_dict(state)
    torch.testing.assert_close(
        curve(resumed, plain, batches[2:]), curve(model, optimizer, batches[2:]), rtol=1e-4, atol=0
    )
    assert losses[1] < losses[0]
