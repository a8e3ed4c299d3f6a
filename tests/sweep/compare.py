"""Compiled runs of a factorized model against float64: training and inference, each lowering, two dtypes, a cache."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import slcompile
from slcompile import torch_private
from slcompile.config import LOWERINGS
from slcompile.health import composed_by_formula, share_of_budget
from slcompile.names import SUFFIX
from tests.sweep.cases import CASES, Case, fewer, longer_or_shorter
from tests.sweep.running import (
    CPP,
    detach_states,
    exact_model,
    fill_factors,
    first_line,
    gradients_of,
    inputs_of,
    leaves,
    loss_from,
)
from tests.testing import aten_kernels, inductor_with_aten

DTYPES = ("float32", "bfloat16")
SUPPORTS = ("vector", "stratified", "uniform")
"""Those that random weights take."""
GENERATED = 4
UNDETERMINED = 0.5
"""Where a number moves by as much of its norm when the inputs are rounded, none of its digits is to be had."""
IN_CODE = ("factored", "auto", "factored", "composed")
"""Lowerings whose graphs are compiled to C++, in turn: what was wrong so far was around factored products."""

Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A way to run a model.

    Attributes:
        mode: training, inference or generate.
        lowering: In ``LOWERINGS``.
        dtype: float32, or bfloat16 for what autocast makes of the same model.
        code: Whether Inductor makes C++ of it, under dynamic shapes. Where not, our passes run and ATen executes.
    """

    mode: str
    lowering: str
    dtype: str = "float32"
    code: bool = False

    def __str__(self) -> str:
        return ", ".join([self.mode, self.lowering, self.dtype, *(["C++"] if self.code else [])])


@dataclass
class Comparison:
    """What was found of one architecture.

    Attributes:
        name, family, support: Of the model and of its factorized weights.
        runs: Of each run, the distance of the tensor that is furthest from float64's, in what is allowed.
        details: What to look at by eye.
        seconds: All of this took.
        failures: What is wrong.
    """

    name: str
    family: str
    support: str = ""
    runs: dict[str, float] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def runs_of(turn: int) -> list[Run]:
    """The runs of an architecture: every lowering and both dtypes; which ones meet, goes round.

    Args:
        turn: A number of its own.
    """
    code, turn = IN_CODE[turn % len(IN_CODE)], turn // len(IN_CODE)
    first, second = (each for each in LOWERINGS if each != code)
    if turn % 2:
        first, second = second, first
    return [
        Run("inference", code, code=True),
        *([Run("training", code, code=True)] if turn % 4 == 0 else []),
        Run("inference", first),
        Run("inference", second, "bfloat16"),
        Run("training", LOWERINGS[turn // 2 % len(LOWERINGS)], "bfloat16"),
        Run("generate", LOWERINGS[turn // 6 % len(LOWERINGS)]),
    ]


def compare(name: str, code: bool = True, support: str = "") -> Comparison:
    """Factorizes an architecture explicitly and compares all of ``runs_of``.

    Args:
        name: In ``CASES``.
        code: Whether to compile to C++, too, which takes most of the time.
        support: Of the weights; by default each architecture has its own, in turn.
    """
    began = time.perf_counter()
    turn = zlib.crc32(name.encode())
    support = support or SUPPORTS[turn % len(SUPPORTS)]
    case = CASES[name]
    found = Comparison(name, case.family, support)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.make()
    inputs = case.inputs(model)
    config = dataclasses.replace(case.options, support=support)
    slcompile.factorize_(model, config, example_kwargs=inputs)
    detach_states(model)
    fill_factors(model)
    yardstick = Yardstick(model, case, inputs)
    found.details += [yardstick.narrowed] if yardstick.narrowed else []
    for run in runs_of(turn // len(SUPPORTS)):
        if (run.mode == "generate" and not yardstick.generates(found)) or (run.code and not code):
            continue
        compare_run(found, yardstick, run)
    found.seconds = time.perf_counter() - began
    return found


def compare_run(found: Comparison, yardstick: Yardstick, run: Run) -> None:
    """Adds a run's distances.

    What is wrong is a failure, unless torch alone gets the dense model wrong as well, or no arithmetic of the run's
    dtype could be right: MobileViT's batch norms divide by the spread of two numbers.
    """
    try:
        numbers = yardstick.compiled(run)
        distances = yardstick.distances(run, numbers)
    except Exception as error:
        excuse = WithoutUs(yardstick, run).error
        if excuse:
            found.details.append(f"{run}: without slcompile the dense model has {excuse}")
        else:
            found.failures.append(f"{run}: {first_line(error)}")
        return
    wrong = [each for each in distances if not each.share <= 1]
    alone = WithoutUs(yardstick, run) if wrong else None
    undetermined = yardstick.undetermined(run) if wrong else set()
    excuses = {
        each: f"float64's moves by {UNDETERMINED} of its norm and more where inputs are rounded to {run.dtype}"
        if (each.batch, each.name) in undetermined
        else "torch alone is as far off, or gets the dense model wrong"
        for each in wrong
        if (each.batch, each.name) in undetermined or (alone is not None and alone.excuses(each, numbers))
    }
    found.details += [f"{each}; {excuse}" for each, excuse in excuses.items()]
    found.failures += [str(each) for each in wrong if each not in excuses]
    found.runs[str(run)] = max((each.share for each in distances if each not in excuses), default=0.0)


@dataclass(frozen=True)
class Off:
    """How far a tensor is from float64."""

    run: Run
    batch: str
    name: str
    relative: float
    share: float

    def __str__(self) -> str:
        return f"{self.run}, {self.batch}: {self.name} is off by {self.relative:.1e}, {self.share:.1f} of what may be"


class WithoutUs:
    """What torch alone makes of the merged, dense model in the same run, and of weights composed by their formula.

    Attributes:
        error: With what the dense model fails; empty where it does not.
    """

    def __init__(self, yardstick: Yardstick, run: Run) -> None:
        self.yardstick, self.run = yardstick, run
        self.exact, self.error, self.found = yardstick.exact(run), "", {}
        self.wrong: set[tuple[str, str]] = set()
        merged = yardstick.merged()
        try:
            self.found = merged.compiled(run, dense=True)
            self.wrong = {(each.batch, each.name) for each in merged.distances(run, self.found) if not each.share <= 1}
        except Exception as error:
            self.error = first_line(error)

    def excuses(self, off: Off, numbers: Mapping[str, Numbers]) -> bool:
        """Says whether torch's own result is as far off, of the dense model or of weights composed by their formula.

        Or whether of a factor's gradient, the dense weight's is wrong.
        """
        if off.name not in numbers[off.batch]:
            return False
        if (off.batch, off.name.split(SUFFIX)[0]) in self.wrong:
            return True
        return self._is_as_far_off(off, numbers, self.found) or self._is_as_far_off(off, numbers, self.by_formula)

    def _is_as_far_off(self, off: Off, numbers: Mapping[str, Numbers], own: Mapping[str, Numbers]) -> bool:
        alone = own.get(off.batch, {}).get(off.name)
        if alone is None:
            return False
        found, exact = numbers[off.batch][off.name], self.exact[off.batch][off.name]
        return share_of_budget(found, alone, exact, getattr(torch, off.run.dtype))[1] <= 1

    @functools.cached_property
    def by_formula(self) -> dict[str, Numbers]:
        """What torch alone gives where the model composes its weights in ops of torch."""
        return self.yardstick.by_formula().compiled(self.run, dense=True)


class Yardstick:
    """A factorized model with its batches, and what eager mode and float64 make of them."""

    def __init__(self, model: nn.Module, case: Case, inputs: Mapping[str, Any]) -> None:
        self.model, self.case = model, case
        self.batches = {"many": inputs, "other": longer_or_shorter(case, inputs), "few": fewer(case, inputs)}
        self.exact_model, self.narrowed = exact_model(model, inputs)
        self._known: dict[tuple[str, ...], dict[str, Numbers]] = {}

    def merged(self) -> Yardstick:
        """The same of the merged model."""
        return Yardstick(slcompile.merge_(copy.deepcopy(self.model)), self.case, self.batches["many"])

    def by_formula(self) -> Yardstick:
        """The same of the model whose weights are composed in ops of torch."""
        return Yardstick(composed_by_formula(copy.deepcopy(self.model)), self.case, self.batches["many"])

    def generates(self, found: Comparison) -> bool:
        """Whether the model has ``generate``, and it works in eager mode and in float64."""
        if not (hasattr(self.model, "can_generate") and self.model.can_generate()):
            return False
        run, where = Run("generate", "auto"), "eager mode"
        try:
            self.eager(run)
            where = "float64"
            self.exact(run)
        except Exception as error:
            found.details.append(f"generate does not work in {where}: {first_line(error)}")
            return False
        return True

    def compiled(self, run: Run, dense: bool = False) -> dict[str, Numbers]:
        """What a compiled run gives; by Inductor without slcompile where the model is dense."""
        model = copy.deepcopy(self.model)
        settings: dict[str, Any] = {"dynamic": True if run.code or run.mode == "generate" else None}
        if not dense:
            options = {"lowering": run.lowering, **({"inductor": CPP} if run.code else {})}
            settings |= {"backend": "sltrain", "options": options}
        elif run.code:
            settings |= {"options": CPP}
        else:
            settings |= {"backend": inductor_with_aten}
        torch._dynamo.reset()
        with torch_private.unlimited_recompiles(), contextlib.nullcontext() if run.code else aten_kernels():
            if run.mode != "generate":
                return self._measure(run, model, torch.compile(model, **settings))
            model.compile(**settings)
            return self._measure(run, model, model)

    def distances(self, run: Run, found: Mapping[str, Numbers]) -> list[Off]:
        """The distance of each tensor; of one that is missing, an infinite one."""
        eager, exact = self.eager(run), self.exact(run)
        dtype = getattr(torch, run.dtype)
        distances = []
        for batch, numbers in exact.items():
            for name in sorted(same_steps(found[batch], eager[batch], numbers) & numbers.keys()):
                truth = numbers[name]
                if name in found[batch]:
                    off = share_of_budget(found[batch][name], eager[batch][name], truth, dtype)
                    distances.append(Off(run, batch, name, *off))
                elif bool(truth.any()):
                    distances.append(Off(run, batch, name, 1.0, math.inf))
        return distances

    def eager(self, run: Run) -> dict[str, Numbers]:
        """What eager mode gives, without slcompile's passes."""
        return self._once(("eager", run.mode, run.dtype, *self._batches(run)), run, self.model)

    def exact(self, run: Run) -> dict[str, Numbers]:
        """What float64 gives."""
        return self._once(("exact", run.mode, *self._batches(run)), run, self.exact_model)

    def undetermined(self, run: Run) -> set[tuple[str, str]]:
        """Batches and names of the numbers that float64 gives otherwise where inputs are rounded to the run's dtype."""
        rounded = copy.copy(self)
        rounded.batches = {name: rounded_to(getattr(torch, run.dtype), each) for name, each in self.batches.items()}
        rounded._known = {}
        moved = rounded.exact(run)
        return {
            (batch, name)
            for batch, numbers in self.exact(run).items()
            for name, number in numbers.items()
            if number.is_floating_point()
            and float((moved[batch][name] - number).norm()) >= UNDETERMINED * float(number.norm()) > 0
        }

    def _once(self, key: tuple[str, ...], run: Run, model: nn.Module) -> dict[str, Numbers]:
        if key not in self._known:
            model = copy.deepcopy(model)
            self._known[key] = self._measure(run, model, model, exact=key[0] == "exact")
        return self._known[key]

    def _batches(self, run: Run) -> dict[str, Mapping[str, Any]]:
        """What a run is called with, one after the other."""
        names = {"inference": ("many", "other") if run.code else ("few",) if run.dtype == "float32" else ("many",)}
        batches = {name: self.batches[name] for name in names.get(run.mode, ("many",)) if self.batches[name]}
        return batches or {"many": self.batches["many"]}

    def _measure(
        self, run: Run, model: nn.Module, function: Callable[..., Any], exact: bool = False
    ) -> dict[str, Numbers]:
        """What a model gives of each batch, under the run's autocast where it is not the exact one."""
        measure = {"generate": generated, "training": trained}.get(run.mode, inferred)
        model.train(run.mode == "training")
        found = {}
        for name, inputs in self._batches(run).items():
            torch.manual_seed(7)
            with torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bfloat16" and not exact):
                found[name] = measure(model, function, inputs_of(model, inputs))
        return found


def rounded_to(dtype: torch.dtype, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs, their floating-point numbers as near as ``dtype`` has them."""

    def round_one(each: Any) -> Any:
        return each.to(dtype).to(each.dtype) if isinstance(each, Tensor) and each.is_floating_point() else each

    return torch_private.map_leaves(round_one, dict(inputs))


def same_steps(*runs: Numbers) -> set[str]:
    """Names of the numbers that can be compared: of texts that went apart, what came before."""
    names = set().union(*runs)
    if "tokens" not in names:
        return names
    texts = [numbers["tokens"][:, -GENERATED:] for numbers in runs]
    equal = torch.stack([(each == texts[0]).all(0) for each in texts]).all(0)
    until = GENERATED if bool(equal.all()) else int(equal.int().argmin())
    return {f"logits of step {step}" for step in range(min(until + 1, GENERATED))}


@torch.no_grad()
def inferred(model: nn.Module, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Numbers:
    """The outputs."""
    return {f"output {name}": each.clone() for name, each in leaves(function(**inputs)).items()}


def trained(model: nn.Module, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Numbers:
    """The outputs and every parameter's gradient."""
    model.zero_grad()
    outputs = leaves(function(**inputs))
    with torch.autocast("cpu", enabled=False):
        loss_from(outputs).backward()
    found = {f"output {name}": each.detach().clone() for name, each in outputs.items()}
    return found | {f"gradient of {name}": each for name, each in gradients_of(model).items()}


@torch.no_grad()
def generated(model: nn.Module, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Numbers:
    """The logits of a few steps of ``generate`` with a cache, and the text."""
    inputs = {name: each for name, each in inputs.items() if name != "labels"}
    result = model.generate(
        **inputs,
        max_new_tokens=GENERATED,
        min_new_tokens=GENERATED,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {f"logits of step {step}": each for step, each in enumerate(result.logits)} | {"tokens": result.sequences}


def worst_of(runs: Mapping[str, float], words: Sequence[str]) -> float | None:
    """The largest share of the runs of this mode and kind; None if there is none."""
    return max((share for run, share in runs.items() if all(word in run.split(", ") for word in words)), default=None)
