"""What training a model takes, known before it is run: ``estimate_memory``, without a GPU and without the weights."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import SLConfig, did_you_mean
from slcompile.factorize import checked_config, factorize_, unwrapped
from slcompile.liveness import PARTS, PROOF_LAYERS, Event, Plan, profile, repeated, step_events
from slcompile.step_graphs import Call, capture
from slcompile.weight import SLWeight

Build = Callable[[int | None], nn.Module]
"""Makes a model on the meta device, with that many layers; None: as it is."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes; step counters, 4 bytes a tensor, are left out.

    Attributes:
        state: Bytes kept for a parameter, by its number of elements and its bytes an element.
        scratch: Bytes that its step allocates for one parameter, likewise.
        together: Whether one step holds what it allocates for all parameters at once (``foreach``).
        scratch_cpu: As ``scratch``, on the CPU, where that is another implementation.
    """

    state: Callable[[int, int], int]
    scratch: Callable[[int, int], int]
    together: bool = False
    scratch_cpu: Callable[[int, int], int] | None = None

    def scratch_on(self, device: str) -> Callable[[int, int], int]:
        """``scratch`` on a device."""
        return self.scratch_cpu if device == "cpu" and self.scratch_cpu is not None else self.scratch


def _copies(number: int) -> Callable[[int, int], int]:
    return lambda count, itemsize: number * count * itemsize


def _blockwise(count: int, itemsize: int) -> int:
    # bitsandbytes: two moments, a byte each and a float32 scale for every 256; small tensors stay float32.
    return 8 * count if count < 4096 else 2 * count + 8 * math.ceil(count / 256)


OPTIMIZERS = {
    "adamw": Optimizer(_copies(2), _copies(0)),
    "adamw-foreach": Optimizer(_copies(2), _copies(1), together=True),
    # On the CPU bitsandbytes unpacks the moments and a block's scales to five float32 tensors.
    "adamw8bit": Optimizer(_blockwise, _copies(0), scratch_cpu=lambda count, itemsize: 20 * count),
    "sgd": Optimizer(_copies(0), _copies(0)),
    "sgd-momentum": Optimizer(_copies(1), _copies(0)),
}
"""``adamw``: torch's with ``fused=True``; ``adamw-foreach``: torch's default on GPUs; ``adamw8bit``: bitsandbytes'."""

COMPILED = ("model", "layers")
DEVICES = ("cpu", "cuda")

LLAMAS = {
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-7b": (4096, 11008, 32, 32),
}
"""The paper's models: width, intermediate width, layers, heads; a vocabulary of 32000 and a head of its own."""


@dataclass(frozen=True)
class Usage:
    """What one variant of a model takes in a training step; bytes throughout.

    Attributes:
        parameter_count: Numbers that are trained.
        largest: The most that each of ``PARTS`` takes at any time in the step.
        peak: The most that is allocated at one time.
        place: Where that is.
        at_peak: What each of ``PARTS`` takes then; the sum is ``peak``.
        places: The most that is allocated in each place, in the order of the step.
    """

    parameter_count: int
    largest: Mapping[str, int]
    peak: int
    place: str
    at_peak: Mapping[str, int]
    places: Mapping[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """What training takes: with sparse-plus-low-rank weights, with low-rank ones, and dense.

    Attributes:
        sltrain: With the given config.
        low_rank: With B and A alone: the same graphs without values, their positions, gradients and state.
        dense: The model as it is, under Inductor.
        layers: Layers of the model; None where it was not made from a configuration.
        captured_layers: Layers of the deepest graphs that were made; the others repeat the middle one.
        settings: What it was asked for.
    """

    sltrain: Usage
    low_rank: Usage
    dense: Usage
    layers: int | None
    captured_layers: int | None
    settings: Mapping[str, Any]

    @property
    def peak(self) -> int:
        """Most bytes allocated at one time in a step with sparse-plus-low-rank weights."""
        return self.sltrain.peak

    def variants(self) -> dict[str, Usage]:
        """The three, by the names they have in tables."""
        return {"dense": self.dense, "low rank": self.low_rank, "sltrain": self.sltrain}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``settings``, ``layers``, ``captured_layers``; the fields of each ``Usage`` under ``variants``."""
        variants = {
            name: {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(usage).items()}
            for name, usage in self.variants().items()
        }
        captured = {"layers": self.layers, "captured_layers": self.captured_layers}
        return {"settings": dict(self.settings), **captured, "variants": variants}

    def __str__(self) -> str:
        columns = list(self.variants().values())
        size, unit = (1e9, "GB") if self.dense.peak >= 1e10 else (1e6, "MB")

        def row(label: str, cells: Sequence[str]) -> str:
            return f"{label:<36}" + "".join(f"{cell:>16}" for cell in cells)

        def amounts(label: str, values: Sequence[int]) -> str:
            return row(label, [f"{value / size:,.2f}" for value in values])

        def parts(name: str, indent: str) -> list[str]:
            table = [(part, [getattr(each, name)[part] for each in columns]) for part in PARTS]
            return [amounts(indent + part, values) for part, values in table if max(values) >= size / 200]

        rule = "-" * 84
        lines = [", ".join(f"{key} {value}" for key, value in self.settings.items()), ""]
        lines += [row(unit, list(self.variants())), rule]
        lines.append(row("trained parameters (million)", [f"{each.parameter_count / 1e6:,.1f}" for each in columns]))
        lines += ["", "the most at any time", *parts("largest", "  "), rule]
        lines += [amounts("peak", [each.peak for each in columns]), *parts("at_peak", "  ")]
        lines.append(row("of dense", [f"{each.peak / self.dense.peak:.0%}" for each in columns]))
        lines += [rule, *(f"the peak of {name} is in: {each.place}" for name, each in self.variants().items())]
        if self.captured_layers != self.layers:
            lines.append(
                f"{PROOF_LAYERS} layers were captured and the middle one repeated for {self.layers}; for "
                f"{self.captured_layers} that gave what their own graphs gave, to the byte"
            )
        return "\n".join(lines)


def llama_config(name: str) -> Any:
    """The transformers configuration of one of ``LLAMAS``.

    Raises:
        ValueError: There is none of that name.
        ImportError: transformers is not installed.
    """
    if name not in LLAMAS:
        raise ValueError(f"model got {name!r}{did_you_mean(name, LLAMAS)}")
    width, intermediate, layers, heads = LLAMAS[name]
    return _transformers().LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        tie_word_embeddings=False,
    )


def hf_config(path: str | os.PathLike[str]) -> Any:
    """The transformers configuration in a file, or in a directory's config.json.

    Raises:
        ValueError: There is no such file, or transformers cannot read it.
        ImportError: transformers is not installed.
    """
    if not Path(path).exists():  # transformers would take the path for a name on the hub
        raise ValueError(f"path of the configuration must be a file or a directory, got {os.fspath(path)!r}")
    try:
        return _transformers().AutoConfig.from_pretrained(os.fspath(path))
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} holds no configuration that transformers can read: {error}") from error


def estimate_memory(
    model_or_config: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: SLConfig | None = None,
    optimizer: str = "adamw",
    per_layer: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
    compiled: str | None = None,
) -> MemoryReport:
    """Estimates the memory of a training step from its graphs; nothing of the model's size is allocated.

    A step is ``compiled_model(*args, **kwargs).loss.backward(); optimizer.step(); optimizer.zero_grad()``, any but the
    first one. Of a model that returns no loss, the gradient of what it returns is counted, and the loss is not. Bytes
    are those that tensors ask for; an allocator rounds and caches, and a CUDA context takes memory besides.

    Args:
        model_or_config: A dense model on any device, left as it is; or a transformers configuration with
            ``num_hidden_layers``, of which a causal language model is built on the meta device. Of a deep one a few
            layers are captured and one of them repeated, where that is shown to give what one layer more gives; else
            all are.
        args, kwargs: What the model is called with; only shapes and dtypes matter.
        config: Defaults to ``SLConfig()``.
        optimizer: One of ``OPTIMIZERS``.
        per_layer: Whether ``slcompile.optim.per_layer`` updates parameters and frees gradients in the backward pass.
        dtype: Of floating-point parameters and arguments; by default a model's own, and float32 for a configuration.
        device: ``"cuda"`` or ``"cpu"``: whose lowerings and kernels. Without a GPU at hand, an sm_80's.
        compiled: ``"model"``: in one graph, which returns all gradients at its end, too late for per-layer updates to
            lower the peak. ``"layers"``: each layer by itself; what lies between them is taken to be fused too. By
            default ``"layers"`` with per-layer updates.

    Raises:
        ValueError: An argument is not allowed, or as ``factorize_``.
        ImportError: A configuration is given, and transformers is not installed.
        torch._dynamo.exc.Unsupported: The model cannot be captured as one graph.
    """
    config = checked_config(config)
    compiled = compiled or ("layers" if per_layer else "model")
    for name, value, allowed in (
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ("device", device, DEVICES),
        ("compiled", compiled, COMPILED),
    ):
        if value not in allowed:
            raise ValueError(f"{name} got {value!r}{did_you_mean(value, allowed)}")
    kind = OPTIMIZERS[optimizer]
    plan = Plan(device, kind.scratch_on(device), kind.together, per_layer, compiled == "layers")
    call = (tuple(args), dict(kwargs or {}))
    build, layers = _builder(model_or_config, dtype)
    usages, depths = {}, []
    for factorized in (True, False):
        make = _factorizing(build, config, call) if factorized else build
        with _quietly():
            events, depth = _step(make, layers, call, dtype, plan, config if factorized else None)
            model = make(layers)
        depths.append(depth)
        for name in ("sltrain", "low_rank") if factorized else ("dense",):
            usages[name] = _usage(model, events, kind, with_values=name != "low_rank")
    settings = {
        "optimizer": optimizer + (" per layer" if per_layer else ""),
        "rank": config.rank,
        "density": config.density,
        "support": config.support,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "compiled": compiled,
    }
    return MemoryReport(
        **usages, layers=layers, captured_layers=max(filter(None, depths), default=None), settings=settings
    )


def held_memory(
    model_or_config: Any, *, config: SLConfig, optimizer: str = "adamw", dtype: torch.dtype | None = None
) -> dict[str, Usage]:
    """What is held all the time, without the graphs: parameters, stored indices, buffers and optimizer state.

    Args and errors as for ``estimate_memory``; weights are those of linear modules.

    Returns:
        ``"sltrain"``, ``"low_rank"`` and ``"dense"``.
    """
    build, layers = _builder(model_or_config, dtype)
    with _quietly():
        factorized = _factorizing(build, config, None)(layers)
    kind = OPTIMIZERS[optimizer]
    return {
        "sltrain": _usage(factorized, [], kind, with_values=True),
        "low_rank": _usage(factorized, [], kind, with_values=False),
        "dense": _usage(build(layers), [], kind, with_values=True),
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = 'estimating from a configuration needs transformers: pip install "slcompile[examples]"'
        raise ImportError(message) from error
    return transformers


def _builder(source: Any, dtype: torch.dtype | None) -> tuple[Build, int | None]:
    """What makes the dense model, and its number of layers where that can be chosen."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        if any(isinstance(each, SLWeight) for each in model.modules()):
            raise ValueError("model_or_config must be a dense model, got a factorized one; give it before factorize_")
        return lambda _: _meta_copy(model).to(dtype).train(), None
    layers = getattr(source, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            "model_or_config must be a torch.nn.Module or a transformers configuration with num_hidden_layers, got "
            f"{type(source).__name__}"
        )
    make = _transformers().AutoModelForCausalLM.from_config

    def build(depth: int | None) -> nn.Module:
        config = copy.deepcopy(source)
        config.num_hidden_layers, config.use_cache = depth, False
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:depth]
        with torch.device("meta"):
            model: nn.Module = make(config).to(dtype or torch.float32).train()
        return model

    return build, layers


def _factorizing(build: Build, config: SLConfig, call: Call | None) -> Build:
    """Makes the factorized model; weights are found on the graph of a call, or without one by the kind of module."""

    def make(depth: int | None) -> nn.Module:
        model = build(depth)
        if call is None:
            return factorize_(model, config)
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

        def to_meta(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return torch.empty_like(each, device="meta", dtype=dtype if each.is_floating_point() else each.dtype)

        args, kwargs = torch_private.map_leaves(to_meta, call)
        return factorize_(model, config, example_args=args, example_kwargs=kwargs)

    return make


def _meta_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the announcement of each conversion, which here replaces no weights of the user's."""
    log = logging.getLogger("slcompile")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _step(
    make: Build, layers: int | None, call: Call, dtype: torch.dtype | None, plan: Plan, config: SLConfig | None
) -> tuple[list[Event], int | None]:
    """The events of a step of a model of this depth, and the depth of the deepest graphs that were made for them."""

    def captured(depth: int | None) -> list[Event]:
        return step_events(capture(make(depth), call, dtype, plan.device, config), plan)

    proof = PROOF_LAYERS + 1
    if layers is None or layers <= proof:
        return captured(layers), layers
    few, more = captured(PROOF_LAYERS), captured(proof)
    if profile(repeated(few, proof)) != profile(more):
        return captured(layers), layers
    return repeated(few, layers), proof


def _usage(model: nn.Module, events: Sequence[Event], optimizer: Optimizer, with_values: bool) -> Usage:
    """Adds what is held all the time to the events of a step."""
    weights = [module for module in model.modules() if isinstance(module, SLWeight)]
    left_out = set() if with_values else {id(each.values) for each in weights}
    indices = {id(each.index): each.index for each in weights if each.support == "uniform"}
    parameters = [each for each in model.parameters() if id(each) not in left_out]
    trained = [each for each in parameters if each.requires_grad]
    now = dict.fromkeys(PARTS, 0)
    now["parameters"] = sum(each.nbytes for each in parameters)
    now["indices"] = sum(each.nbytes for each in indices.values()) if with_values else 0
    now["buffers"] = sum(each.nbytes for each in model.buffers() if id(each) not in indices)
    now["optimizer state"] = sum(optimizer.state(each.numel(), each.itemsize) for each in trained)
    largest, at_peak, peak, where = dict(now), dict(now), sum(now.values()), "before the step"
    places: dict[str, int] = {}
    for event in events:
        if event.of_values and not with_values:
            continue
        now[event.part] += event.size
        total = sum(now.values())
        largest[event.part] = max(largest[event.part], now[event.part])
        label = event.label
        places[label] = max(places.get(label, 0), total)
        if total > peak:
            at_peak, peak, where = dict(now), total, label
    return Usage(sum(each.numel() for each in trained), largest, peak, where, at_peak, places)
