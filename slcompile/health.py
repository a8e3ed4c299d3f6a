"""Is my run healthy? ``check`` compares what is compiled with eager mode on a user's own model and batch.

The yardstick is float64. What is compiled may be as far from it as eager mode is, times a little luck, plus the
rounding of a sum of 256 terms. Whatever is further is a wrong number, and is traced to a pass or to a weight.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import LOWERINGS, SKIPPABLE, SLConfig, checked_config
from slcompile.convert.ledger import EXPLICIT, Ledger
from slcompile.factorize import factorize_model, factors, merge_, merge_some
from slcompile.models import (
    arguments_for,
    buffers_restored,
    gpus_of,
    positional,
    random_state_restored,
    require_numbers,
    unwrapped,
)
from slcompile.names import SUFFIX
from slcompile.weight.placing import base_class
from slcompile.weight.structure import weights_in

LUCK = 4
"""Both distances from float64, eager's and the compiled run's, are random: one may be a few times the other."""

ULPS = 16
"""Units in the last place of a sum of 256 terms, which rounds as a random walk."""

MODES = ("training", "inference")

SHOWN = 5
"""Wrong tensors of a run that the report prints; it holds all."""

Loss = Callable[[Any], Tensor]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Distance:
    """How far one tensor of one run is from float64.

    Attributes:
        run: Such as ``"training, factored"``.
        tensor: Such as ``"gradient of layers.0.weight_sl.B"`` or ``"output logits"``.
        relative: Norm of the difference, divided by the exact norm.
        share: The same as a share of what is allowed; above 1 it is a wrong number.
    """

    run: str
    tensor: str
    relative: float
    share: float


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found.

    Attributes:
        model: Name of its class.
        versions: Of Python, torch and what else matters.
        config: The options.
        weights: Names of the factorized weights.
        worst: For each run, the tensor that is furthest in what is allowed.
        wrong: Every tensor that is further than is allowed.
        blame: For each run that is wrong, a sentence on what is to blame.
    """

    model: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    weights: tuple[str, ...]
    worst: tuple[Distance, ...]
    wrong: tuple[Distance, ...]
    blame: Mapping[str, str]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it, which has no infinity and no NaN: they are None."""
        found = dataclasses.asdict(self)
        for each in (*found["worst"], *found["wrong"]):
            each |= {key: each[key] if math.isfinite(each[key]) else None for key in ("relative", "share")}
        return found

    def __str__(self) -> str:
        verdict = "healthy" if self.is_healthy else f"{len(self.wrong)} wrong tensors"
        lines = [
            f"{self.model}: {verdict}; {len(self.weights)} factorized weights",
            ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            ", ".join(f"{name}={value!r}" for name, value in self.config.items()),
            "",
            f"{'run':28}{'of what is allowed':>20}{'relative':>12}  furthest tensor",
        ]
        lines += [f"{each.run:28}{each.share:>20.2f}{each.relative:>12.1e}  {each.tensor}" for each in self.worst]
        for run, sentence in self.blame.items():
            lines += ["", f"{run}: {sentence}"]
            wrong = sorted((each for each in self.wrong if each.run == run), key=lambda each: -each.share)
            lines += [
                f"  {each.tensor}: {each.relative:.1e} relative, {each.share:.1f} of what is allowed"
                for each in wrong[:SHOWN]
            ]
            lines += [f"  and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
        return "\n".join(lines)


@torch.inference_mode(False)
@torch.enable_grad()
def check(
    model: nn.Module,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: SLConfig | None = None,
    loss: Loss | None = None,
) -> CheckReport:
    """Compares a model's compiled training step and inference with eager mode, under each lowering, against float64.

    Compared are all floating-point outputs and the gradient of every parameter, and the outputs after merging. Copies
    of the model are run: several of its size in memory, and as many compiles. Factors that start at zero are filled
    with small random numbers first, since behind them every gradient is zero. The step in which the string converts is
    left out of a model that draws random numbers, as dropout does: conversion draws before it, which moves its own.

    Args:
        model: Is not changed, nor is the random state. A dense one is factorized as
            ``factorize_(model, config, example_args=args)`` would.
        args, kwargs: A batch; moved to the model's device, floating-point tensors to its dtype.
        config: Defaults to ``SLConfig()``; of a factorized model only ``keep_weights`` and the like count.
        loss: Makes the number to differentiate from what the model returns. By default the output called ``loss``, if
            there is one, and the mean square distance of every other output from 1.

    Raises:
        ValueError: As ``factorize_``; the model is on the meta device; it returns nothing that depends on a parameter,
            or NaN in eager mode or in float64; or ``loss`` is no function, or makes no such number.
    """
    config, loss = checked_config(config), loss or _default_loss
    if not callable(loss):
        raise ValueError(f"loss must be a function of what the model returns, or None, got {loss!r:.200}")
    model = unwrapped(model)
    require_numbers(model)
    batch: tuple[Any, Any] = arguments_for(model, (positional(args), dict(kwargs or {})))
    with random_state_restored(model):
        return _checked(model, batch, config, loss)


def _checked(dense: nn.Module, batch: tuple[Any, Any], config: SLConfig, loss: Loss) -> CheckReport:
    model = copy.deepcopy(dense)
    is_dense = not weights_in(model)
    if is_dense:
        factorize_model(model, config, *batch, Ledger(silent=True))
    vars(model).setdefault(EXPLICIT, config)  # so that weights which are merged to find the one to blame stay dense
    _fill(model)
    runner = _Runner(batch, config, loss)
    checker = _Checker(model, runner)
    runs = [(mode, lowering) for mode in MODES for lowering in ("eager", *LOWERINGS)]
    distances = {f"{mode}, {lowering}": checker.distances(mode, lowering) for mode, lowering in runs}
    distances["inference, merged"] = checker.merged_distances()
    if is_dense and not runner.draws(dense := copy.deepcopy(dense)):
        distances["training, converting"] = _converting(dense, runner)
    worst = [max(found, key=lambda each: each.share) for found in distances.values() if found]
    wrong = [each for found in distances.values() for each in found if not each.share <= 1]
    blame = {run: checker.blame(run) for run in dict.fromkeys(each.run for each in wrong)}
    return CheckReport(
        base_class(model).__name__,
        _versions(),
        config.to_options(),
        tuple(checker.names),
        tuple(worst),
        tuple(wrong),
        blame,
    )


@dataclass(frozen=True)
class _Runner:
    """Runs a model, or what was compiled of it, on the batch."""

    batch: Any
    config: SLConfig
    loss: Loss

    def measure(self, model: nn.Module, mode: str, run: Run | None = None) -> dict[str, Tensor]:
        """Returns the outputs of a model, and in training the gradients; on the same random numbers each time."""
        args, kwargs = arguments_for(model, self.batch)
        model.train(mode == "training").zero_grad()
        try:
            # Submodules that are compiled by themselves, too, run eagerly in eager mode, and fill no caches.
            stance = torch.compiler.set_stance("force_eager") if run is None else nullcontext()
            gradients_too = torch.set_grad_enabled(mode == "training")
            with buffers_restored(model), _seeded(model), gradients_too, stance:
                outputs = (model if run is None else run)(*args, **kwargs)
                found = {f"output {'.'.join(path)}".strip(): leaf for path, leaf in _tensors(outputs)}
                if mode == "training":
                    loss = self.loss(outputs)
                    if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
                        raise ValueError(f"loss must return a scalar that depends on a parameter, got {loss!r:.200}")
                    loss.backward()
                found = {name: leaf.detach().clone() for name, leaf in found.items()}
            gradients = {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
            return found | {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
        finally:
            model.zero_grad()

    def draws(self, model: nn.Module) -> bool:
        """Returns whether a model's training step draws random numbers; in eager mode, which converts nothing."""
        args, kwargs = arguments_for(model, self.batch)
        model.train()
        stance = torch.compiler.set_stance("force_eager")
        with buffers_restored(model), _seeded(model), torch.no_grad(), stance:
            before = _generators(model)
            model(*args, **kwargs)
            return not all(map(torch.equal, before, _generators(model)))

    def compiled(
        self, model: nn.Module, mode: str, lowering: str = "auto", skip: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        """Returns what a compiled run of a model gives."""
        options = self.config.to_options()
        options |= {"lowering": lowering, "skip_passes": skip, "inductor": {"fallback_random": True}}
        with torch_private.unlimited_recompiles():
            return self.measure(model, mode, torch.compile(model, backend="sltrain", options=options))


def _converting(dense: nn.Module, runner: _Runner) -> list[Distance]:
    """Returns the distances of the step in which the string converts a dense model, which it does to this one."""
    found = runner.compiled(dense, "training")
    return _Checker(dense, runner).compare("training, converting", found)


class _Checker:
    """A factorized model, and what eager mode and float64 give for it where weights are composed by their formula."""

    def __init__(self, model: nn.Module, runner: _Runner) -> None:
        self.model, self.runner = model, runner
        self.names = list(factors(model))
        eager = composed_by_formula(copy.deepcopy(model))
        exact = composed_by_formula(copy.deepcopy(model).double())
        self.eager = {mode: runner.measure(eager, mode) for mode in MODES}
        self.exact = {mode: runner.measure(exact, mode) for mode in MODES}
        for where, numbers in (("eager mode", self.eager), ("float64", self.exact)):
            for name, tensor in numbers["training"].items():
                if bool(tensor.isnan().any()):
                    raise ValueError(
                        f"model gives NaN in {where} for this batch, in {name}: there is nothing to compare with"
                    )

    def distances(
        self, mode: str, lowering: str, skip: tuple[str, ...] = (), dense: Sequence[str] = ()
    ) -> list[Distance]:
        """Returns the distance of each tensor of a compiled run.

        Args:
            mode: In ``MODES``.
            lowering: In ``LOWERINGS``, or ``"eager"``.
            skip: Passes that are left out.
            dense: Weights that are merged to dense before; what is told of them is left out.
        """
        model = copy.deepcopy(self.model)
        merge_some(model, dense)
        if lowering == "eager":
            found = self.runner.measure(model, mode)
        else:
            found = self.runner.compiled(model, mode, lowering, skip)
        merged = tuple(f"gradient of {name}{SUFFIX}." for name in dense)
        return [each for each in self.compare(f"{mode}, {lowering}", found) if not each.tensor.startswith(merged)]

    def merged_distances(self) -> list[Distance]:
        """Returns the distance of each output of the merged model in eager mode."""
        merged = merge_(copy.deepcopy(self.model))
        return self.compare("inference, merged", self.runner.measure(merged, "inference"))

    def dense_is_wrong(self, mode: str) -> bool:
        """Returns whether Inductor alone gets the merged model wrong."""
        merged = merge_(copy.deepcopy(self.model))
        exact = self.runner.measure(copy.deepcopy(merged).double(), mode)
        eager = self.runner.measure(merged, mode)
        with torch_private.unlimited_recompiles():
            found = self.runner.measure(merged, mode, torch.compile(merged, options={"fallback_random": True}))
        return any(
            not share_of_budget(found[name], eager[name], exact[name])[1] <= 1 for name in exact.keys() & found.keys()
        )

    def blame(self, run: str) -> str:
        """Says what a wrong run has to be blamed on, by leaving out passes, then weights."""
        mode, lowering = run.split(", ")
        if lowering == "merged":
            return "the merged weights are not what the factors compose to"
        if lowering == "eager":
            return "the op that composes weights does not compute their formula"
        if lowering == "converting":
            return "the step that converts is: call slcompile.factorize_(model, config) before training to avoid it"
        if self.dense_is_wrong(mode):
            return "Inductor alone, without slcompile, gets the merged model wrong as well: report it to PyTorch"
        for name in reversed(
            SKIPPABLE
        ):  # what a later pass gets wrong is not there either where an earlier one did not run
            if self._is_right(mode, lowering, skip=(name,)):
                return f'the pass {name} is to blame: options={{"skip_passes": ["{name}"]}} avoids it'
        suspects = list(self.names)
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            others = [name for name in self.names if name not in half]
            is_there = not self._is_right(mode, lowering, dense=others)
            suspects = half if is_there else suspects[len(half) :]
        others = [name for name in self.names if name not in suspects]
        if not self._is_right(mode, lowering, dense=others):
            avoid = f'options={{"exclude": ["{suspects[0]}"]}} avoids it'
            return f"no single pass is to blame; the weight {suspects[0]} alone shows it: {avoid}"
        return "no single pass and no single weight is to blame"

    def _is_right(self, mode: str, lowering: str, skip: tuple[str, ...] = (), dense: Sequence[str] = ()) -> bool:
        return all(each.share <= 1 for each in self.distances(mode, lowering, skip, dense))

    def compare(self, run: str, found: Mapping[str, Tensor]) -> list[Distance]:
        """Returns the distance of each tensor that a run gave; of one that it did not give, an infinite one."""
        mode, lowering = run.split(", ")
        eager, exact = self.eager[mode], self.exact[mode]
        distances = []
        for name, truth in exact.items():
            if name in found:
                distances.append(Distance(run, name, *share_of_budget(found[name], eager[name], truth)))
            elif bool(truth.any()) and lowering != "merged":
                distances.append(Distance(run, f"{name}, which is missing", 1.0, math.inf))
        return distances


def share_of_budget(
    found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Returns the distance of a tensor from the exact one, relative to its norm, and as a share of what is allowed.

    Infinities of the same places, as of masked logits, have no distance.

    Args:
        found, eager, exact: What a compiled run gave, what eager mode gave, and what it gave in float64.
        dtype: What was computed in; by default eager's.
    """
    ulp = torch.finfo(eager.dtype if dtype is None else dtype).eps / 2
    found, eager = found.double(), eager.double()
    same = (found == exact) & (eager == exact) & exact.isinf()
    found, eager, exact = (each.masked_fill(same, 0) for each in (found, eager, exact))
    error, norm = (found - exact).norm(), exact.norm()
    allowed = LUCK * (eager - exact).norm() + ULPS * ulp * norm
    if not bool(error):
        return 0.0, 0.0
    return (error / norm).item(), (error / allowed).item()


def _tensors(outputs: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for path, leaf in torch_private.leaves_with_paths(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield path, leaf


def _default_loss(outputs: Any) -> Tensor:
    leaves = [(path, leaf) for path, leaf in _tensors(outputs) if leaf.requires_grad]
    if not leaves:
        raise ValueError("model returns no floating-point tensor that depends on a parameter; give loss")
    parts = [leaf.sum() if path[-1:] == ("loss",) else (leaf - 1).square().mean() for path, leaf in leaves]
    return torch.stack([part.reshape(()) for part in parts]).sum()


def composed_by_formula(model: nn.Module) -> nn.Module:
    """Lets a model compose its weights by their formula, and not by the op that is checked."""
    for weight in weights_in(model):
        vars(weight)["forward"] = weight.reference
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Leaves the start of training, where a factor is zero and so is the gradient of the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in weights_in(model):
            for factor in weight.parameters():
                if not bool(factor.any()):
                    factor.copy_(torch.randn(factor.shape) * 0.05)


def _generators(model: nn.Module) -> list[Tensor]:
    """Returns the states of the generators that a model draws from."""
    return [torch.random.get_rng_state(), *map(torch.cuda.get_rng_state, gpus_of(model))]


@contextmanager
def _seeded(model: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(devices=gpus_of(model)):
        torch.manual_seed(7)
        yield


def _versions() -> dict[str, str]:
    packages = [name for name in ("slcompile", "torch", "triton", "transformers") if find_spec(name) is not None]
    own = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    return own | {name: version(name) for name in packages}
