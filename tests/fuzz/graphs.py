"""Runs a random program's training or inference through our passes in one of three ways, and compares with float64.

``traced``: AOTAutograd traces and partitions the program, every pass runs, ATen executes the graphs. No Dynamo and no
conversion: each weight is factorized before. The result of a factored matmul is made contiguous, as what generated code
makes up for is not there.
``captured``: the backend with Dynamo, conversion and all passes but ``lower_ops``; ATen executes the graphs.
``generated``: the backend as users have it, with Inductor's C++.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx, nn

import slcompile
from slcompile import torch_private
from slcompile.backend import sltrain
from slcompile.health import LUCK, composed_by_formula
from slcompile.passes import joint_passes, post_passes, run
from slcompile.weight.placing import put_in_place
from slcompile.weight.structure import FactorizedWeight, structure_of
from tests.fuzz.programs import Program, Step, options, programs, roundoff, shapes, widths
from tests.testing import aten_kernels

WAYS = ("traced", "captured", "generated")
MODES = ("training", "inference")


def check(way: str, mode: str, steps: list[Step], width: int, shape: Sequence[int], options: dict[str, Any]) -> None:
    """Asserts that a program computes what it should, in one way and mode.

    Raises:
        AssertionError: An output or a gradient is further from float64 than eager mode is and rounding allows.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    if way != "captured":  # a graph break is a matter of Dynamo; each part of a broken graph is compiled by itself
        steps = [("linear" if name == "broken" and way == "traced" else name, *rest) for name, *rest in steps]
    model = Program(steps, width)
    x = torch.randn(*shape, width)
    config = slcompile.SLConfig(**options, exclude=(), init="kaiming")
    if way == "traced" or mode == "inference":
        factorize_all(model, config)
    if way == "traced":
        found = measure_traced(model, x, config, mode)
    else:
        with aten_kernels() if way == "captured" else contextlib.nullcontext(), torch_private.unlimited_recompiles():
            compiled = torch.compile(model, backend=sltrain, options={**options, "exclude": (), "init": "kaiming"})
            found = measure(compiled, model, x, mode)  # where it is dense, this call converts it
            if mode == "training" and any(isinstance(each, FactorizedWeight) for each in model.modules()):
                randomize(model)
                found = measure(compiled, model, x, mode)
    compare(found, model, x, mode, roundoff(steps))


def compare(found: dict[str, Tensor], model: nn.Module, x: Tensor, mode: str, eps: float) -> None:
    """Asserts that what a run gave is as near to float64 as eager mode is, weights composed by their formula."""
    eager_model = composed_by_formula(copy.deepcopy(model))
    exact_model = composed_by_formula(copy.deepcopy(model).double())
    eager, exact = measure(eager_model, eager_model, x, mode), measure(exact_model, exact_model, x.double(), mode)
    assert found.keys() == eager.keys() == exact.keys(), (found.keys(), exact.keys())
    for name, truth in exact.items():
        assert found[name].dtype == eager[name].dtype, (name, found[name].dtype, eager[name].dtype)
        assert found[name].shape == truth.shape, (name, found[name].shape, truth.shape)
        error, eagers, norm = (found[name] - truth).norm(), (eager[name] - truth).norm(), truth.norm()
        assert error <= LUCK * eagers + eps * norm, f"{name}: {error:.3g} of {norm:.3g}, eager {eagers:.3g}"


def measure(call: Callable[..., Any], model: nn.Module, x: Tensor, mode: str) -> dict[str, Tensor]:
    """Returns the output of a run, and in training the gradients of a fixed random sum of it."""
    x = x.detach().clone().requires_grad_(mode == "training")
    model.train(mode == "training").zero_grad()
    with torch.set_grad_enabled(mode == "training"):
        output = call(x)
    if mode == "inference":
        return {"output": output}
    output.backward(tangent(output))
    found = {"output": output.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    return {name: each for name, each in found.items() if each is not None}


def tangent(output: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """The gradient that the output is given: fixed random numbers, in the layout that was traced."""
    random = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = random.to(output.dtype)
    return random if strides is None else random.new_empty_strided(output.shape, strides).copy_(random)


def measure_traced(model: nn.Module, x: Tensor, config: slcompile.SLConfig, mode: str) -> dict[str, Tensor]:
    """The same, from the graphs that Inductor would be given, executed node by node."""
    x = x.detach().clone().requires_grad_(mode == "training")
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    primals = [*model.parameters(), *model.buffers(), x]
    with torch.set_grad_enabled(mode == "training"):
        graphs = torch_private.aot_graphs(
            Tupled(model), [x], lambda joint, _: run(joint_passes(config), joint) and None
        )
    saved = outputs_of(graphs[0])  # before they are lowered, which gives them other names
    with contiguous_results():
        for each in graphs:
            run(post_passes(config), each)
    with torch.no_grad():
        results = fx.Interpreter(graphs[0]).run(*primals)
        output = results[0]
        if mode == "inference":
            return {"output": output}
        made = dict(zip(saved, results, strict=True))
        operands = [
            tangent(output, node.meta["val"].stride()) if node.name.startswith("tangents") else made[node.name]
            for node in graphs[1].graph.find_nodes(op="placeholder")
        ]
        gradients = fx.Interpreter(graphs[1]).run(*operands)
    found = {"output": output, "gradient of the input": gradients[len(names)]}
    found |= {f"gradient of {name}": each for name, each in zip(names, gradients, strict=False)}
    return {name: each for name, each in found.items() if each is not None}


class Tupled(nn.Module):
    """A model that returns its tensor in a tuple, as graphs do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.model(x),)


def outputs_of(gm: fx.GraphModule) -> list[str]:
    """Returns the names of what a graph returns."""
    (output,) = gm.graph.find_nodes(op="output")
    return [str(each) for each in output.args[0]]


@contextlib.contextmanager
def contiguous_results() -> Iterator[None]:
    """Within, ``lower_ops`` leaves factored matmuls contiguous: views of them were traced so, and ATen is strict."""
    module = sys.modules["slcompile.passes.lower_ops"]
    table = dict(module._aten())
    factored = torch.ops.slcompile.linear_factored.default
    original = table[factored]
    table[factored] = lambda *args: [each.contiguous() for each in original(*args)]
    before, module._aten = module._aten, lambda: table
    try:
        yield
    finally:
        module._aten = before


def factorize_all(model: nn.Module, config: slcompile.SLConfig) -> None:
    """Factorizes every weight, without a graph to say which to; all factors random."""
    for name, dense in list(model.named_parameters()):
        weight = structure_of(config)(dense.shape, config, name=name, dtype=dense.dtype)
        weight.reset_parameters()
        put_in_place(model, name, weight)
    randomize(model)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Leaves the start of training, where a factor is zero and so is the gradient of the other."""
    random = torch.Generator().manual_seed(1)
    for module in model.modules():
        for factor in module.parameters() if isinstance(module, FactorizedWeight) else ():
            factor.copy_(torch.randn(factor.shape, generator=random) / 8)


def batch(first: int, counts: dict[str, Any], size: int = 50) -> None:
    """Runs so many programs from a number on, and counts them by way, mode, lowering and support.

    One in 100 runs in generated code, which takes seconds to compile; six in 100 through the backend without it.
    """
    number = first
    gc.collect()
    gc.freeze()  # what is there already need not be looked through for owners of weights again and again
    gc.disable()

    @hypothesis.seed(first)
    @settings(
        max_examples=size, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(programs, widths, shapes, options)
    def each(steps: list[Step], width: int, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        nonlocal number
        random = Random(number)
        way = random.choices(WAYS, (93, 6, 1))[0]
        mode = random.choices(MODES, (2, 3))[0]
        try:
            check(way, mode, steps, width, shape, options)
        except Exception as error:
            about = {"steps": steps, "width": width, "shape": shape, "options": options}
            message = f"{type(error).__name__}: {error}"[:500]
            counts["wrong"].append({"number": number, "way": way, "mode": mode, **about, "error": message})
        for kind in (way, mode, options["lowering"], options["support"]):
            counts[kind] = counts.get(kind, 0) + 1
        counts["examples"] += 1
        number += 1

    try:
        each()
    finally:
        gc.enable()
        gc.unfreeze()
