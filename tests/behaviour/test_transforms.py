"""What differentiates a factorized model besides ``backward``: double backward, torch.func, forward mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import slcompile
from tests.testing import SPECTRAL, Plain, compiled_with, converted, randomize

pytestmark = pytest.mark.usefixtures("aten_kernels")


@pytest.mark.slow
def test_double_backward_works_in_eager_mode_and_is_refused_by_compiled_code():
    model, x = Plain(), torch.randn(8, 64, requires_grad=True)
    compiled = compiled_with("sltrain", model)
    compiled(x).sum().backward()
    model.zero_grad()

    def penalty(run: Callable[..., Tensor], x: Tensor, parameters: object = None) -> Tensor:
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    penalty(model, x).backward()
    merged = slcompile.merge_(copy.deepcopy(model))
    weights = {name: each.detach().requires_grad_() for name, each in merged.named_parameters()}
    penalty(lambda x: functional_call(merged, weights, (x,)), x).backward()
    for name, weight in (("up.weight", model.up), ("down.weight", model.down)):
        factors = weight.weight_sl
        torch.testing.assert_close(
            factors.B.grad, factors.scale * weights[name].grad @ factors.A.T, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiled, x).backward()


def loss_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().sum()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    return found


def func_grad(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return torch.func.grad(lambda parameters: loss_of(model, parameters, x))(parameters)


def func_vmap(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradients for each sample, added up."""
    per_sample = torch.func.vmap(
        torch.func.grad(lambda parameters, x: loss_of(model, parameters, x)), in_dims=(None, 0)
    )(parameters, x)
    return {name: each.sum(0) for name, each in per_sample.items()}


def func_jacrev(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    jacobian = torch.func.jacrev(lambda parameters: loss_of(model, parameters, x)[None])(parameters)
    return {name: each[0] for name, each in jacobian.items()}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inside"])
@pytest.mark.parametrize("transform", [func_grad, func_vmap, func_jacrev])
def test_transforms_differentiate_the_factors(transform, compiled):
    support = "uniform" if compiled else "stratified"
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(**SPECTRAL, support=support))
    parameters, x = {name: each.detach() for name, each in model.named_parameters()}, torch.randn(5, 64)
    run = compiled_with("sltrain", transform, fullgraph=True) if compiled else transform
    found = run(model, parameters, x)
    for name, expected in gradients(model, x).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def func_jvp(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, directions: dict[str, Tensor]) -> Tensor:
    return torch.func.jvp(lambda parameters: loss_of(model, parameters, x), (parameters,), (directions,))[1]


def dual_numbers(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, directions: dict[str, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(each, directions[name]) for name, each in parameters.items()}
        return forward_ad.unpack_dual(loss_of(model, duals, x)).tangent


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "compiled"), [(func_jvp, False), (func_jvp, True), (dual_numbers, False)])
def test_forward_mode_differentiates_the_factors(transform, compiled):
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(**SPECTRAL))
    parameters, x = {name: each.detach() for name, each in model.named_parameters()}, torch.randn(5, 64)
    directions = {name: torch.randn_like(each) for name, each in parameters.items()}
    run = compiled_with("sltrain", transform, fullgraph=True) if compiled else transform
    expected = sum((each * directions[name]).sum() for name, each in gradients(model, x).items())
    torch.testing.assert_close(run(model, parameters, x, directions), expected, rtol=1e-4, atol=1e-3)


def test_an_ensemble_of_factorized_models_is_vectorised():
    models = [slcompile.factorize_(Plain(), slcompile.SLConfig(**SPECTRAL)) for _ in range(3)]  # each with other seeds
    x = torch.randn(5, 64)
    parameters, buffers = torch.func.stack_module_state(models)
    many = torch.func.vmap(lambda *state: functional_call(models[0], state, (x,)))(parameters, buffers)
    torch.testing.assert_close(many, torch.stack([model(x) for model in models]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inside"])
@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 8, "structure": "cp"}], ids=["sparse", "cp"])
def test_autocast_leaves_the_weights_of_transforms_as_exact_as_others(options, compiled):
    model = randomize(slcompile.factorize_(Plain(), slcompile.SLConfig(**options)))

    def scaled(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda each: each * model.up.weight)(x)

    run = torch.compile(scaled, backend="sltrain", fullgraph=True) if compiled else scaled
    with torch.autocast("cpu", torch.bfloat16):
        found = run(torch.ones(1))
    torch.testing.assert_close(found[0], model.up.weight)


def test_a_transform_of_a_model_on_the_meta_device_gives_shapes():
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(**SPECTRAL)).to("meta")
    _, tangent = torch.func.jvp(model, (torch.ones(5, 64, device="meta"),), (torch.ones(5, 64, device="meta"),))
    assert tangent.shape == (5, 64)


class Transforming(nn.Module):
    """Transforms with respect to inputs, inside the model: weights are constants to them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.plain, self.last = Plain(), nn.Linear(64, 64)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "grad":
            return self.last(torch.func.grad(lambda x: self.plain(x).square().sum())(x))
        if self.how == "vmap":
            return self.last(torch.func.vmap(lambda x: self.plain(x))(x))
        return self.last(torch.func.jvp(self.plain, (x,), (x.detach(),))[1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["grad", "vmap", "jvp"])
def test_a_model_that_transforms_its_own_parts_converts(how, counting, assert_eager):
    model, x = Transforming(how), torch.randn(8, 64)
    compiled = compiled_with(counting, model, fullgraph=True)
    for _ in range(3):
        assert_eager(compiled, model, (x,))
    assert converted(model) == {"plain.up.weight", "plain.down.weight", "last.weight"}
    assert counting.calls == 2


@pytest.mark.parametrize(
    "transform",
    [
        lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
        lambda function, x: torch.func.vmap(function)(x),
        lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_a_transform_of_a_compiled_function_runs_it_eagerly(transform):
    model, x = Plain(), torch.randn(8, 64)
    torch.testing.assert_close(transform(compiled_with("sltrain", model), x), transform(model, x))
    assert converted(model) == set()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.func\.(grad|vmap|jvp)\(compiled_fn\)"):
        transform(compiled_with("sltrain", model, fullgraph=True), x)
