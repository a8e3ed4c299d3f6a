"""Activation checkpointing with recomputed and with kept weights: eager's gradients, nothing saved in vain."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slcompile
from tests.testing import saved_for_backward, some_of
from tests.zoo import tiny

pytestmark = pytest.mark.slow

WIDTH, INTERMEDIATE, TOKENS = 48, 80, 40
RANK, DENSITY = 8, 0.05


class Checkpointed(nn.Module):
    """torch.utils.checkpoint around each of two residual layers, which the compiled region contains."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, INTERMEDIATE, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(INTERMEDIATE, WIDTH, bias=False) for _ in range(2))
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):

            def layer(x: Tensor, up: nn.Module = up, down: nn.Module = down) -> Tensor:
                return x + down(torch.tanh(up(x)))

            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def functional() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[bool], None]]:
    model, x = Checkpointed(), torch.randn(TOKENS, WIDTH)

    def switch(on: bool) -> None:
        model.checkpointing = on

    return model, lambda forward: forward(x).square().mean(), switch


def transformers(layers: int = 1) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[bool], None]]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE, "num_attention_heads": 2, "vocab_size": 64}
    model = tiny("llama", num_hidden_layers=layers, **sizes).train()
    ids = torch.randint(0, 64, (2, TOKENS // 2))

    def switch(on: bool) -> None:
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    return model, lambda forward: forward(input_ids=ids, labels=ids, use_cache=False).loss, switch


@pytest.mark.parametrize(
    ("kept", "lowering", "make"),
    some_of(
        itertools.product(("recompute", "keep"), ("composed", "factored"), (functional, transformers)),
        [
            ("recompute", "composed", functional),
            ("recompute", "factored", transformers),
            ("keep", "composed", transformers),
            ("keep", "factored", functional),
        ],
    ),
)
def test_gradients_are_eagers_and_weights_are_saved_only_on_request(make, lowering, kept, aten_kernels):
    model, loss_of, switch = make()
    keep_weights = kept == "keep"
    options = {"rank": RANK, "density": DENSITY, "lowering": lowering, "keep_weights": keep_weights}
    slcompile.factorize_(model, slcompile.SLConfig(rank=RANK, density=DENSITY))
    weights = [each for each in model.modules() if isinstance(each, slcompile.SLWeight)]
    with torch.no_grad():
        for weight in weights:
            weight.B.normal_(std=0.1)

    switch(False)
    eager = loss_of(model)
    eager.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    compiled = torch.compile(model, backend="sltrain", options=options)
    saved_bytes = {}
    for checkpointing in (False, True):
        torch._dynamo.reset()
        switch(checkpointing)
        model.zero_grad()
        loss, saved = saved_for_backward(lambda: loss_of(compiled))
        shapes = {w.shape for w in weights} | {w.shape[::-1] for w in weights}
        composed = [tuple(each.shape) for each in saved if tuple(each.shape) in shapes]
        if lowering == "composed" and keep_weights:
            # The first layer's input needs no gradient where it is the model's own, and so not that weight.
            assert len(weights) - 1 <= len(composed) <= len(weights), (checkpointing, composed)
        else:
            assert composed == [], checkpointing
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved_bytes[checkpointing] = sum(s.nbytes for s in saved if s.untyped_storage().data_ptr() not in parameters)
        loss.backward()
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
        for name, p in model.named_parameters():
            error = (p.grad - expected[name]).norm() / expected[name].norm()
            assert error <= 1e-5, (checkpointing, name, error)
    assert saved_bytes[True] < saved_bytes[False], "checkpointing saved as much as without it"


def test_per_layer_updates_under_checkpointing_are_the_plain_optimizers(aten_kernels):
    """Each update comes while the region before it is still to be recomputed; eager and compiled layer by layer."""
    done = []
    for make in (torch.optim.AdamW, lambda p, **kw: slcompile.optim.per_layer(torch.optim.AdamW, p, **kw)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, loss_of, switch = transformers(layers=2)
        switch(True)
        slcompile.factorize_(model, slcompile.SLConfig(rank=RANK, density=DENSITY))
        optimizer = make(model.parameters(), lr=1e-2)
        losses = []
        for compiled in (False, True):
            if compiled:
                for layer in model.model.layers:
                    layer.compile(backend="sltrain", options={"rank": RANK, "density": DENSITY})
            for _ in range(2):
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        done.append((losses, model.state_dict()))
    (losses, plain), (per_layer_losses, per_layer) = done
    assert losses == per_layer_losses
    assert losses[-1] < losses[0]
    for name, value in plain.items():
        assert torch.equal(value, per_layer[name]), name
