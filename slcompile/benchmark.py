"""How fast is it here? ``bench`` times a user's own model, dense beside factorized, on the device that it is on.

All variants are held at once and take turns, so that each sees the same disturbances; medians are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import LOWERINGS, SLConfig, checked_config, did_you_mean, require_choice
from slcompile.convert.ledger import Ledger
from slcompile.factorize import factorize_model, merge_
from slcompile.measure import seconds_of, synchronize
from slcompile.models import arguments_for, positional, random_state_restored, require_numbers, unwrapped
from slcompile.ops.sparse_cpu import kept_bytes
from slcompile.weight.placing import base_class
from slcompile.weight.structure import weights_in

MODES = ("training", "inference")
VARIANTS = (*LOWERINGS, "eager")
WARMUP = 3
"""Runs of each variant before those that are timed: the first one compiles."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """What one variant takes.

    Attributes:
        seconds: Of a step: the median run.
        quartiles: A quarter of the runs took less than the first, a quarter more than the second.
        tokens_per_second: Where the inputs have tokens.
        peak: The most bytes allocated at once in a step: parameters, buffers, optimizer state and what the step adds.
        compile_seconds: Of the first step, with empty caches, above a step's; 0.0 in eager mode.
    """

    seconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float | None
    peak: int
    compile_seconds: float


@dataclass(frozen=True)
class BenchReport:
    """What ``bench`` measured.

    Attributes:
        model: Name of its class.
        mode: ``"training"`` or ``"inference"``.
        device: The name of the GPU, or the kind and the threads of the CPU.
        versions: Of Python, torch and slcompile.
        config: The options.
        tokens: Of a step; None where the inputs have none.
        runs: Of each variant.
        variants: ``"dense"``, which is Inductor's, and ``"sltrain LOWERING"``.
    """

    model: str
    mode: str
    device: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    tokens: int | None
    runs: int
    variants: Mapping[str, Timing]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it."""
        return dataclasses.asdict(self)

    @property
    def title(self) -> str:
        """What was measured, where, and with which versions."""
        what = "a training step" if self.mode == "training" else "inference"
        tokens = "" if self.tokens is None else f" of {self.tokens} tokens"
        where = ", ".join([self.device, *(f"{name} {number}" for name, number in self.versions.items())])
        return f"{self.model}: {what}{tokens}, {self.runs} runs of each, taking turns\n{where}"

    def rows(self) -> list[list[str]]:
        """Returns the table as text: a head, and a line for each variant."""
        dense = self.variants["dense"]
        head = ["", "step (ms)", "÷ dense", "tokens/s", "peak (MB)", "÷ dense", "compile (s)"]
        body = [
            [
                name,
                f"{1e3 * each.seconds:.4g}",
                f"{each.seconds / dense.seconds:.2f}",
                "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
                f"{each.peak / 1e6:,.1f}",
                f"{each.peak / dense.peak:.2f}",
                f"{each.compile_seconds:.1f}",
            ]
            for name, each in self.variants.items()
        ]
        return [head, *body]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]).rstrip()
            for line in self.rows()
        ]
        return "\n".join([self.title, "", *lines])


def bench(
    model: nn.Module,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: SLConfig | None = None,
    lowerings: Sequence[str] | None = None,
    mode: str = "training",
    loss: Callable[[Any], Tensor] | None = None,
    runs: int = 15,
    inductor: Mapping[str, Any] | None = None,
) -> BenchReport:
    """Times a model's step, dense under Inductor beside factorized, and measures its peak memory and its compile time.

    A training step is forward, backward and a fused AdamW. Copies of the model are run, all of them in memory at once.
    The numbers are not checked here: ``check`` does that.

    Args:
        model: Is not changed, nor is the random state. A dense one is factorized as
            ``factorize_(model, config, example_args=args)`` would; of a factorized one the merged copy is the dense
            variant.
        args, kwargs: A batch; moved to the model's device, floating-point tensors to its dtype.
        config: Defaults to ``SLConfig()``.
        lowerings: Which variants beside the dense one: of ``"auto"``, ``"composed"``, ``"factored"`` and ``"eager"``,
            which compiles nothing. Defaults to the config's.
        mode: ``"training"``, or ``"inference"``: forward without gradients, in eval mode.
        loss: Makes the number to differentiate from what the model returns. By default the output called ``loss``, if
            there is one, else the mean square of every output.
        runs: Timed runs of each variant, at least 3.
        inductor: Inductor's own settings, for all variants, such as ``{"triton.cudagraphs": True}``.

    Raises:
        ValueError: An argument is not allowed, or as ``factorize_``; before anything is timed. Or the model returns
            nothing that depends on a parameter.
    """
    config, model = checked_config(config), unwrapped(model)
    lowerings = _require_allowed(model, config, lowerings, mode, runs, inductor or {})
    batch = arguments_for(model, (positional(args), dict(kwargs or {})))
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    variants = _Variants(model, config, batch, mode, loss or _default_loss, dict(inductor or {}))
    tokens = _tokens_of(batch)
    with torch_private.unlimited_recompiles(), random_state_restored(model):
        steps = {"dense": variants.dense(), **{f"sltrain {each}": variants.factorized(each) for each in lowerings}}
        _compile_something(device, variants.inductor)
        first = {name: _first_run(step, device) for name, step in steps.items()}
        times = interleaved({name: step.run for name, step in steps.items()}, runs, device, warmup=WARMUP - 1)
        peaks = {name: step.held() + first[name][1] + peak_above(step.run, device) for name, step in steps.items()}
    found = {}
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        rate = None if tokens is None else tokens / median
        compiling = 0.0 if name == "sltrain eager" else max(0.0, first[name][0] - median)
        found[name] = Timing(median, (low, high), rate, peaks[name], compiling)
    return BenchReport(
        base_class(model).__name__,
        mode,
        _described(device),
        {"python": platform.python_version(), **{name: version(name) for name in ("torch", "slcompile")}},
        config.to_options(),
        tokens,
        runs,
        found,
    )


def interleaved(
    variants: Mapping[str, Step], runs: int, device: torch.device | str, warmup: int = WARMUP
) -> dict[str, list[float]]:
    """Returns the seconds of each run of each variant; they take turns, after runs that warm each up."""
    device = torch.device(device)
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, run in variants.items():
            times[name].append(seconds_of(run, device))
    return times


def peak_above(run: Step, device: torch.device | str) -> int:
    """Returns the most bytes allocated during a run above what was allocated before it."""
    device = torch.device(device)
    if device.type != "cpu":
        synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(itertools.accumulate(torch_private.allocations(profile), initial=0))


def _require_allowed(
    model: nn.Module,
    config: SLConfig,
    lowerings: Sequence[str] | None,
    mode: str,
    runs: int,
    inductor: Mapping[str, Any],
) -> tuple[str, ...]:
    """Returns the lowerings, or refuses an argument."""
    chosen = (config.lowering,) if lowerings is None else tuple(lowerings)
    if isinstance(lowerings, str) or not chosen:
        raise ValueError(f"lowerings must be a sequence of names, got {lowerings!r}")
    for each in chosen:
        require_choice("lowerings", each, VARIANTS)
    require_choice("mode", mode, MODES)
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 3:
        raise ValueError(f"runs must be an int of at least 3, got {runs!r}")
    known = torch_private.inductor_settings()
    for key in inductor:
        if key not in known:
            raise ValueError(f"inductor has an unknown setting {key!r}{did_you_mean(key, known)}")
    if config.dryrun:
        raise ValueError("config must not have dryrun=True: nothing would be factorized")
    require_numbers(model)
    return chosen


@dataclass(frozen=True)
class _Step:
    """A step of one variant, its model, and its optimizer in training."""

    run: Step
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def held(self) -> int:
        """Returns the bytes of parameters, buffers and optimizer state, which stay allocated between steps."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [each for state in states for each in state.values() if isinstance(each, Tensor)]
        return sum(each.nbytes for each in (*self.model.parameters(), *self.model.buffers(), *tensors))


@dataclass(frozen=True)
class _Variants:
    """Makes the steps of the variants, each of an own copy of the model."""

    model: nn.Module
    config: SLConfig
    batch: Any
    mode: str
    loss: Callable[[Any], Tensor]
    inductor: dict[str, Any]

    def dense(self) -> _Step:
        """Returns the dense step, under Inductor."""
        model = copy.deepcopy(self.model)
        if self._is_factorized():
            merge_(model)
        backend = torch_private.unshared("inductor", config_patches=self.inductor)
        return self._step(model, torch.compile(model, backend=backend, dynamic=False))

    def factorized(self, lowering: str) -> _Step:
        """Returns the step with a lowering, or in eager mode."""
        model = copy.deepcopy(self.model)
        if not self._is_factorized():
            args, kwargs = self.batch
            factorize_model(model, self.config, args, kwargs, Ledger(silent=True))
        if lowering == "eager":
            return self._step(model, model)
        options = self.config.to_options()
        options |= {"lowering": lowering, "inductor": self.inductor}
        backend = torch_private.unshared("sltrain", options=options)
        return self._step(model, torch.compile(model, backend=backend, dynamic=False))

    def _is_factorized(self) -> bool:
        return bool(weights_in(self.model))

    def _step(self, model: nn.Module, run: Callable[..., Any]) -> _Step:
        args, kwargs = self.batch
        model.train(self.mode == "training")
        if self.mode == "inference":
            return _Step(torch.no_grad()(lambda: run(*args, **kwargs)), model, None)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> None:
            self.loss(run(*args, **kwargs)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return _Step(step, model, optimizer)


def _first_run(step: _Step, device: torch.device) -> tuple[float, int]:
    """Returns the seconds of a first run with empty caches, and the bytes that our ops keep from it."""
    before = kept_bytes()
    with torch_private.fresh_cache():
        seconds = seconds_of(step.run, device)
    return seconds, kept_bytes() - before


def _compile_something(device: torch.device, inductor: dict[str, Any]) -> None:
    """Compiles a training step that nobody asked for: what a process does once is not one variant's compile time."""
    layer = nn.Linear(8, 8, device=device)
    with torch_private.fresh_cache(), torch.enable_grad():
        torch.compile(layer, dynamic=False, options=inductor or None)(torch.randn(4, 8, device=device)).sum().backward()


def _tokens_of(batch: Any) -> int | None:
    """Returns the elements of ``input_ids``, else of the first matrix of integers: [batch, length]."""
    leaves = [(path, leaf) for path, leaf in torch_private.leaves_with_paths(batch) if isinstance(leaf, Tensor)]
    matrices = [(path, leaf) for path, leaf in leaves if leaf.dim() == 2 and leaf.dtype in (torch.int32, torch.int64)]
    named = [leaf for path, leaf in matrices if path[-1] == "input_ids"]
    return next((leaf.numel() for leaf in (*named, *(leaf for _, leaf in matrices))), None)


def _default_loss(outputs: Any) -> Tensor:
    leaves = [
        (path, leaf)
        for path, leaf in torch_private.leaves_with_paths(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    if not leaves:
        raise ValueError("model returns no floating-point tensor that depends on a parameter; give loss")
    named = [leaf for path, leaf in leaves if path[-1:] == ("loss",)]
    return named[0].sum() if named else torch.stack([leaf.square().mean() for _, leaf in leaves]).sum()


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named is not None else str(device)
