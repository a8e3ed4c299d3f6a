"""Is the exported model the trained one? Each output of two runs on the same inputs, and each weight, compared."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.export.twin import MakeTensor, evaluating, merged_weights
from slcompile.models import arguments_for
from slcompile.torch_private import leaves_with_paths

log = logging.getLogger("slcompile")

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

# Largest difference relative to the largest magnitude of the output: float32 keeps 24 bits, float16 11 and bfloat16
# 8, and every layer rounds again.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """How far one output is from the trained model's.

    Attributes:
        against: ``"merged"``, PyTorch with the very weights that are written, or ``"onnxruntime"``, the file.
        output: Name of the output.
        shape: Of the output.
        max_abs: Largest absolute difference.
        max_rel: The same, divided by the largest magnitude in the trained model's output.
        histogram: Decade of the absolute difference (-7: from 1e-7 to 1e-6) -> how many elements; None: equal.
        same_argmax: Share of positions at which the largest entry along the last axis is the same one, for
            floating-point outputs of three dimensions (the next token of a language model); else None.
    """

    against: str
    output: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    histogram: dict[int | None, int]
    same_argmax: float | None


def compare(against: str, output: str, got: Tensor, want: Tensor) -> Comparison:
    """Compares one output with the trained model's.

    Raises:
        ValueError: They have different shapes.
    """
    want = want.detach().cpu()
    shape = tuple(want.shape)
    if tuple(got.shape) != shape:
        raise ValueError(f"output {output} has shape {tuple(got.shape)}, the trained model's {shape}")
    difference = (got.double() - want.double()).abs()
    largest = difference.max().item() if want.numel() else 0.0
    scale = want.double().abs().max().item() if want.numel() else 0.0
    exponents, counts = difference[difference > 0].log10().floor().unique(return_counts=True)
    histogram: dict[int | None, int] = {None: int((difference == 0).sum())}
    histogram |= {int(each): int(count) for each, count in zip(exponents, counts, strict=True) if math.isfinite(each)}
    is_logits = want.is_floating_point() and want.dim() == 3 and want.shape[-1] > 1
    same = (got.argmax(-1) == want.argmax(-1)).double().mean().item() if is_logits else None
    return Comparison(against, output, shape, largest, largest / scale if scale else largest, histogram, same)


def compare_calls(
    trained: nn.Module, calls: Sequence[Call], dtype: torch.dtype, names: Sequence[str], file: Path
) -> list[Comparison]:
    """Compares every output of every call with merged PyTorch and with the file in onnxruntime."""
    run = _runner(file, dtype)
    comparisons = []
    for call in calls:
        args, kwargs = arguments_for(trained, call)
        with evaluating(trained):
            expected = tensors_of(trained(*args, **kwargs))
            with merged_weights(trained, dtype):
                results = {"merged": [each.cpu() for each in tensors_of(trained(*args, **kwargs))]}
        if run is not None:
            results["onnxruntime"] = run(call)
        for against, outputs in results.items():
            comparisons += [
                compare(against, name, got, want) for name, got, want in zip(names, outputs, expected, strict=True)
            ]
    return comparisons


def require_close(comparisons: Sequence[Comparison], dtype: torch.dtype) -> None:
    """Raises ValueError for an output that differs by more than ``TOLERANCE``."""
    for each in comparisons:
        if not each.max_rel <= TOLERANCE[dtype]:  # also where it is NaN
            raise ValueError(
                f"output {each.output} of {each.against} differs from the trained model by {each.max_rel:.2e} "
                f"relative, more than the tolerance {TOLERANCE[dtype]:.0e} of {dtype}; nothing was written"
            )


def require_same_weights(file: Path, tensors: Mapping[str, MakeTensor]) -> None:
    """Reads every weight back from the file, one at a time; raises ValueError for one that is not what was meant."""
    import onnx_ir as ir

    for name, value in ir.load(file).graph.initializers.items():
        if name not in tensors or value.const_value is None:
            continue
        if value.const_value.tobytes() != ir.tensor_adapters.TorchTensor(tensors[name]()).tobytes():
            raise ValueError(f"weight {name} in the file is not what its factors compose to; nothing was written")


@dataclass(frozen=True)
class FileFigures:
    """What a model file costs in onnxruntime on the CPU.

    Attributes:
        size: Bytes, of the model and its weights.
        load: Seconds to load it.
        run: Seconds of a run, the median of nine.
    """

    size: int
    load: float
    run: float

    def __str__(self) -> str:
        return f"{self.size / 1e6:.1f} MB, loads in {self.load * 1e3:.0f} ms, runs in {self.run * 1e3:.2f} ms"


def measure(file: Path, call: Call, dtype: torch.dtype) -> FileFigures:
    """Loads and runs a model file that stands with its weights in a directory of its own."""
    begin = time.perf_counter()
    run = _runner(file, dtype)
    load = time.perf_counter() - begin
    assert run is not None, dtype
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        run(call)
        seconds.append(time.perf_counter() - begin)
    size = sum(each.stat().st_size for each in file.parent.iterdir())
    return FileFigures(size, load, statistics.median(seconds[1:]))  # the first run allocates


def worst(comparisons: Sequence[Comparison], against: str) -> tuple[float, float] | None:
    """The largest absolute and relative difference of a kind; None where there is none."""
    found = [each for each in comparisons if each.against == against]
    return (max(each.max_abs for each in found), max(each.max_rel for each in found)) if found else None


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested arguments or outputs, in the order in which torch.export flattens them."""
    return [each for _, each in leaves_with_paths(tree) if isinstance(each, Tensor)]


def bind(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> tuple[Call, dict[str, Any] | None]:
    """Arguments in the order of the model's signature, and the dynamic shapes of each by its name.

    The order is what torch.export flattens, and so that of the graph's inputs, whatever order ``kwargs`` had.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(bound.arguments, dynamic_shapes, strict=False))
    shapes = None if dynamic_shapes is None else {name: dynamic_shapes.get(name) for name in bound.arguments}
    if bound.args and isinstance(bound.args[-1], Mapping):
        # torch.onnx.export takes a dict at the end of the arguments for keyword arguments.
        names = list(bound.arguments)[: len(bound.args)]
        return ((), {**dict(zip(names, bound.args, strict=True)), **bound.kwargs}), shapes
    return (bound.args, bound.kwargs), shapes


def axis_names(model: nn.Module, call: Call, shapes: Mapping[str, Any] | None) -> list[dict[int, str]]:
    """For each tensor among the arguments, in order: dimension -> the name that its dynamic shape gives it."""
    arguments = inspect.signature(model.forward).bind(*call[0], **call[1]).arguments
    names = []
    for spec in _leaf_specs(dict(arguments), shapes or {}):
        dims = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        named = {dim: each if isinstance(each, str) else getattr(each, "__name__", None) for dim, each in dims}
        names.append({dim: name for dim, name in named.items() if name})
    return names


def another_call(trained: nn.Module, call: Call, shapes: Mapping[str, Any] | None) -> list[Call]:
    """The same content with every dynamic dimension half as long, or twice: the first that the model accepts.

    Args:
        shapes: From ``bind``; None: no call.
    """
    if shapes is None:
        return []
    bound = inspect.signature(trained.forward).bind(*call[0], **call[1])
    original = dict(bound.arguments)
    for resize in (_half, _twice):
        for name, value in original.items():
            bound.arguments[name] = _resized(value, shapes[name], resize)
        args, kwargs = arguments_for(trained, (bound.args, bound.kwargs))
        with evaluating(trained), contextlib.suppress(RuntimeError, ValueError, IndexError):
            trained(*args, **kwargs)
            return [(bound.args, bound.kwargs)]
    log.warning(
        "slcompile: outputs are compared at one shape only: the model accepts neither half nor twice the sizes of its "
        "dynamic dimensions"
    )
    return []


def _runner(file: Path, dtype: torch.dtype) -> Callable[[Any], list[Tensor]] | None:
    """Runs the file on nested arguments; None for bfloat16, which onnxruntime has no arithmetic for on the CPU."""
    import onnxruntime

    if dtype is torch.bfloat16:
        log.warning("slcompile: onnxruntime has no bfloat16 arithmetic on the CPU: %s was not run there", file.name)
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: at 2 it reports each constant that it does not fold
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(arguments: Any) -> list[Tensor]:
        given = [each.to(dtype) if each.is_floating_point() else each for each in tensors_of(arguments)]
        names = [each.name for each in session.get_inputs()]
        feeds = {name: each.detach().cpu().numpy() for name, each in zip(names, given, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feeds)]

    return run


def _leaf_specs(value: Any, spec: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [spec]
    if isinstance(value, Mapping):
        return [leaf for key, each in value.items() for leaf in _leaf_specs(each, spec.get(key) if spec else None)]
    if isinstance(value, (list, tuple)):
        specs = spec if spec else [None] * len(value)
        return [leaf for each, inner in zip(value, specs, strict=True) for leaf in _leaf_specs(each, inner)]
    return []


def _resized(value: Any, shapes: Any, resize: Callable[[Tensor, int], Tensor]) -> Any:
    if shapes is None:
        return value
    if isinstance(value, Tensor):
        dims = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes)
        for dim, spec in dims:
            is_static = spec is None or isinstance(spec, int) or spec is torch.export.Dim.STATIC
            value = value if is_static else resize(value, dim)
        return value
    if isinstance(value, Mapping):
        return {key: _resized(each, shapes.get(key), resize) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resized(each, spec, resize) for each, spec in zip(value, shapes, strict=True))
    return value


def _half(tensor: Tensor, dim: int) -> Tensor:
    return tensor.narrow(dim, 0, max(1, tensor.shape[dim] // 2))


def _twice(tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor, tensor], dim)
