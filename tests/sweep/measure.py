"""What ``backend="sltrain"`` does to one architecture: matmuls found and replaced, losses, gradients, merging, ONNX."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import inspect
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slcompile
from slcompile import torch_private
from slcompile.config import LOWERINGS
from slcompile.health import ULPS, share_of_budget
from tests.sweep.cases import CASES
from tests.sweep.compare import Run, WithoutUs, Yardstick
from tests.sweep.running import (
    CPP,
    detach_states,
    exact_model,
    fill_factors,
    first_line,
    gradients_of,
    inputs_of,
    leaves,
    loss_of,
)
from tests.testing import aten_kernels

STEPS = 5
EPS = ULPS * torch.finfo(torch.float32).eps / 2

MATMULS = frozenset("addmm addmv baddbmm bmm dot mm mv _grouped_mm grouped_mm_fallback".split())


@dataclass
class Row:
    """What was measured of an architecture.

    Attributes:
        name, family, parameters: Of the dense model.
        graphs, breaks: That Dynamo captured, and the places where it had to end one.
        matmuls, replaced: That read a parameter, and whose parameter is factorized.
        left: Reason -> how many parameters that matmuls read stay dense for it.
        details: What to look at by eye: each reason that is none of a weight's shape, name or tie.
        share: Of the elements that matmuls read, those of factorized parameters.
        loss: Largest distance of the losses from float64's, in what is allowed.
        gradients: Of each lowering, the largest distance of a parameter's gradient, in what is allowed.
        merged: Largest distance of an output after merging, relative to its largest magnitude.
        onnx: The same in onnxruntime, or why there is no file.
        seconds: All of this took.
        failures: What is wrong.
    """

    name: str
    family: str
    parameters: int = 0
    graphs: int = 0
    breaks: int = 0
    matmuls: int = 0
    replaced: int = 0
    left: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    share: float = 0.0
    loss: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    merged: float = 0.0
    onnx: str = ""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def measure(name: str, code: bool = False, lowerings: Sequence[str] = LOWERINGS, export: bool = True) -> Row:
    """Converts an architecture by the string, trains it compiled, eager and in float64, merges and exports it.

    Args:
        name: In ``CASES``.
        code: Whether Inductor makes C++ of the graphs. Where not, our passes run and ATen executes what they leave.
        lowerings: Under which the gradients are compared; the first one trains.
        export: Whether to write ONNX.
    """
    began = time.perf_counter()
    with contextlib.nullcontext() if code else aten_kernels(), torch_private.unlimited_recompiles():
        row = _measure(name, code, lowerings, export)
    row.seconds = time.perf_counter() - began
    return row


def _measure(name: str, code: bool, lowerings: Sequence[str], export: bool) -> Row:
    row = Row(name, CASES[name].family)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = CASES[name].make()
    inputs = CASES[name].inputs(model)
    row.parameters = sum(each.numel() for each in model.parameters())
    names = list(model.state_dict())
    read = parameters_that_matmuls_read(model, inputs)
    owners = dict(model.named_modules())

    case = CASES[name]
    options = {**vars(case.options), "inductor": CPP}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # mended by the first run
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowerings[0]})
    first = loss_of(compiled, inputs).item()
    counters = torch._dynamo.utils.counters
    row.graphs, row.breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    check_report(row, slcompile.last_report() if slcompile.factors(model) else None, read, owners, case.options)
    if not slcompile.factors(model):
        row.failures.append("nothing was factorized")
        return row
    detach_states(model)
    eager = Reference(model, inputs)
    if not abs(first - eager.loss) <= EPS * abs(eager.loss):
        row.failures.append(f"the converting run's loss is {first}, eager's {eager.loss}")

    fill_factors(model)
    trained = {lowering: model if lowering == lowerings[0] else copy.deepcopy(model) for lowering in lowerings}
    reference = copy.deepcopy(model)
    exact, narrowed = exact_model(model, inputs)
    row.details += [narrowed] if narrowed else []
    eager, wide = Reference(reference, inputs), Reference(exact, inputs_of(exact, inputs))
    for lowering, each in trained.items():
        run = (
            compiled
            if each is model
            else torch.compile(each, backend="sltrain", options={**options, "lowering": lowering})
        )
        loss = loss_of(run, inputs)
        loss.backward()
        got, trial = gradients_of(each), Row(name, row.family)
        share = compare_gradients(trial, lowering, got, eager.gradients, wide.gradients)
        if trial.failures and is_excused(Yardstick(model, case, inputs), Run("training", lowering, code=code), got):
            row.details += [f"{failure}; torch alone is as far off of the dense model" for failure in trial.failures]
        else:
            row.failures += trial.failures
            row.gradients[lowering] = share

    losses = [
        train(compiled, optimizer, inputs),
        train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-3), inputs),
        train(exact, torch.optim.AdamW(exact.parameters(), lr=1e-3), inputs_of(exact, inputs)),
    ]
    ours, eagers, truth = (torch.tensor(each, dtype=torch.float64) for each in losses)
    row.loss = share_of_budget(ours, eagers, truth, torch.float32)[1]
    if not row.loss <= 1:
        row.failures.append(f"losses {losses[0]}, eager's {losses[1]}, in float64 {losses[2]}")

    if export and case.exports:
        row.onnx = export_onnx(row, model, inputs)
    check_merged(row, model, inputs, names)
    return row


def is_excused(yardstick: Yardstick, run: Run, got: Mapping[str, Tensor]) -> bool:
    """Says whether torch alone is as far off in all gradients that are off."""
    numbers = {"many": {f"gradient of {name}": each for name, each in got.items()}}
    wrong = [
        each for each in yardstick.distances(run, numbers) if each.name.startswith("gradient") and not each.share <= 1
    ]
    alone = WithoutUs(yardstick, run)
    return bool(wrong) and all(alone.excuses(each, numbers) for each in wrong)


class Reference:
    """Loss and gradients of a model's eager training step."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        model = copy.deepcopy(model)
        loss = loss_of(model, inputs)
        loss.backward()
        self.loss, self.gradients = loss.item(), gradients_of(model)


class MatmulReads(TorchDispatchMode):
    """Which storages hold what matmuls multiply, or weights of convolutions without groups, in an eager run."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in MATMULS:
            operands = args[1:] if name in ("addmm", "baddbmm") else args
            self.storages |= {each.untyped_storage().data_ptr() for each in operands if isinstance(each, Tensor)}
        elif name == "convolution" and not args[6] and args[8] == 1:
            self.storages.add(args[1].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def parameters_that_matmuls_read(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[list[str], nn.Parameter]]:
    """Names and parameter of each matrix that a matmul of the eager model reads, itself or a view of it.

    Found without our passes and without Dynamo, to check what those found.
    """
    with MatmulReads() as reads:
        loss_of(model, inputs)
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2 and parameter.untyped_storage().data_ptr() in reads.storages:
            found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def train(function: Callable[..., Any], optimizer: torch.optim.Optimizer, inputs: Mapping[str, Any]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(function, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare_gradients(
    row: Row, lowering: str, got: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> float:
    """The largest distance of a parameter's gradient from float64's, as a share of what is allowed."""
    # AOTAutograd gives zeros where only an output that the loss does not read depends on a parameter; eager gives none.
    alone = (eager.keys() - got.keys()) | {name for name in got.keys() - eager.keys() if bool(got[name].any())}
    if alone:
        row.failures.append(f"{lowering}: {sorted(alone)} have a gradient in one of eager and compiled")
    worst = 0.0
    for name in got.keys() & eager.keys():
        if bool(eager[name].any()) and not bool(got[name].any()):
            row.failures.append(f"{lowering}: the gradient of {name} is zero")
        relative, share = share_of_budget(got[name], eager[name], exact[name], torch.float32)
        if not share <= 1:
            row.failures.append(
                f"{lowering}: the gradient of {name} is off by {relative:.1e}, {share:.1f} of what may be"
            )
        worst = max(worst, share)
    return worst


def check_report(
    row: Row,
    report: slcompile.PassReport | None,
    read: Sequence[tuple[list[str], nn.Parameter]],
    modules: Mapping[str, nn.Module],
    config: slcompile.SLConfig,
) -> None:
    """Counts what was found, replaced and left; what eager matmuls read must be there, each reason must be true."""
    decisions = [*report.replaced, *report.left] if report else []
    # A weight that its module replaces while it runs, as by .to(dtype), is none that the graph's matmul reads.
    found = {each.name for each in decisions if each.matmuls or "set_" in each.detail}
    missed = [names[0] for names, _ in read if found.isdisjoint(names)]
    if missed:
        row.failures.append(f"matmuls read {', '.join(missed)}, which the report does not say")
    row.matmuls = sum(each.matmuls for each in decisions)
    row.replaced = sum(each.matmuls for each in report.replaced) if report else 0
    elements = {each.name: torch.Size(each.shape).numel() for each in decisions if each.name in found}
    row.share = sum(elements[each.name] for each in report.replaced) / sum(elements.values()) if elements else 0.0
    left = [each for each in decisions if each.reason and each.name in found]
    row.left = dict(Counter(each.reason for each in left))
    tied = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    parameters = {name: parameter for names, parameter in read for name in names}
    kernels = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    convolved = {id(module.weight) for module in modules.values() if isinstance(module, kernels)}
    for each in left:
        is_kernel = each.name in parameters and id(parameters[each.name]) in convolved
        sizes = (each.shape[0], math.prod(each.shape[1:])) if is_kernel else each.shape
        holds = {
            "too_small": min(sizes) < config.min_dim,
            "not_2d": len(each.shape) > 2,
            "excluded": any(fnmatch.fnmatch(each.name, pattern) for pattern in config.exclude),
            "tied": each.name in parameters and id(parameters[each.name]) in tied,
        }.get(each.reason)
        if holds is None:
            row.details.append(f"{each.name} {list(each.shape)}: {each.reason}, {each.detail}")
        elif not holds:
            row.failures.append(f"{each.name} {list(each.shape)} stays dense as {each.reason}, which it is not")


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point outputs of a model in eval mode."""
    torch.manual_seed(7)
    return leaves(model.eval()(**inputs))


def check_merged(row: Row, model: nn.Module, inputs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Merges a model, into a freshly built one and in place; both must give its outputs under its own names."""
    expected = outputs_of(model, inputs)
    fresh = CASES[row.name].make()
    fresh.load_state_dict(slcompile.merged_state_dict(model), strict=True)
    slcompile.merge_(model)
    if list(model.state_dict()) != list(names):
        row.failures.append(f"merge_ leaves other names: {sorted(set(model.state_dict()) ^ set(names))}")
    for each in (fresh, model):
        for name, output in outputs_of(each, inputs).items():
            largest = expected[name].abs().max().item()
            row.merged = max(row.merged, (output - expected[name]).abs().max().item() / max(largest, 1e-30))
    if not row.merged <= EPS:
        row.failures.append(f"merged outputs differ by {row.merged:.1e} relative")


def export_onnx(row: Row, model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Exports without labels; where that fails, whether torch can export the dense model at all."""
    kwargs = {name: each for name, each in inputs.items() if name not in ("labels", "future_values")}
    if "labels" in inputs and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        kwargs["decoder_input_ids"] = inputs["labels"]
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # torch 2.13 translates no other one
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            report = slcompile.export_onnx(model, (), path, kwargs=kwargs)
        except Exception as error:
            why = dense_export_error(row, model, kwargs, path)
            if not why:
                row.failures.append(f"ONNX: {first_line(error)}, but torch exports the dense model")
            return why or "failed"
        return f"{report.max_rel:.0e}"


def dense_export_error(row: Row, model: nn.Module, kwargs: Mapping[str, Any], path: Path) -> str:
    """Why torch's own export of the dense model does not work; empty where it does."""
    dense = slcompile.merge_(copy.deepcopy(model)).eval()
    try:
        torch.onnx.export(dense, (), path, kwargs=dict(kwargs), dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        return f"torch cannot: {first_line(error)}"
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = dict(zip([each.name for each in session.get_inputs()], kwargs.values(), strict=False))
        session.run(None, {name: each.numpy() for name, each in feeds.items()})
    except Exception as error:
        return f"onnxruntime cannot: {first_line(error)}"
    return ""
