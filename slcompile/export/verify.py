"""Is the exported model the trained one? Each output of two runs on the same inputs, and each weight, compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slcompile.export.call import Call, tensors_of
from slcompile.export.twin import MakeTensor, merged_weights

log = logging.getLogger("slcompile")

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
    # Infinities of the same places, as of masked logits, do not differ.
    difference = (got.double() - want.double()).abs().masked_fill(got == want, 0)
    largest = difference.max().item() if want.numel() else 0.0
    scale = want.double().masked_fill(want.isinf(), 0).abs().max().item() if want.numel() else 0.0
    exponents, counts = difference[difference > 0].log10().floor().unique(return_counts=True)
    histogram: dict[int | None, int] = {None: int((difference == 0).sum())}
    histogram |= {int(each): int(count) for each, count in zip(exponents, counts, strict=True) if math.isfinite(each)}
    is_logits = want.is_floating_point() and want.dim() == 3 and want.shape[-1] > 1
    same = (got.argmax(-1) == want.argmax(-1)).double().mean().item() if is_logits else None
    return Comparison(against, output, shape, largest, largest / scale if scale else largest, histogram, same)


def compare_calls(trained: nn.Module, calls: Sequence[Call], dtype: torch.dtype, file: Path) -> list[Comparison]:
    """Compares every output of every call with merged PyTorch and with the file in onnxruntime."""
    run = _runner(file, dtype)
    comparisons = []
    for call in calls:
        expected = tensors_of(call.run(trained))
        with merged_weights(trained, dtype):
            results = {"merged": [output.cpu() for output in tensors_of(call.run(trained))]}
        if run is not None:
            results["onnxruntime"] = run(call)
        for against, outputs in results.items():
            triples = zip(call.output_names, outputs, expected, strict=True)
            comparisons += [compare(against, name, got, want) for name, got, want in triples]
    return comparisons


def require_close(comparisons: Sequence[Comparison], dtype: torch.dtype) -> None:
    """Raises ValueError for an output that differs by more than ``TOLERANCE``."""
    for comparison in comparisons:
        if not comparison.max_rel <= TOLERANCE[dtype]:  # also where it is NaN
            raise ValueError(
                f"output {comparison.output} of {comparison.against} differs from the trained model by "
                f"{comparison.max_rel:.2e} relative, more than the tolerance {TOLERANCE[dtype]:.0e} of {dtype}; "
                "nothing was written"
            )


def require_same_weights(file: Path, tensors: Mapping[str, MakeTensor]) -> None:
    """Reads every weight back from the file, one at a time; raises ValueError for one that is not what was meant."""
    import onnx_ir as ir

    for name, value in ir.load(file).graph.initializers.items():
        if name not in tensors or value.const_value is None:
            continue
        if value.const_value.tobytes() != ir.tensor_adapters.TorchTensor(tensors[name]()).tobytes():
            raise ValueError(f"weight {name} in the file is not what its factors compose to; nothing was written")


def worst(comparisons: Sequence[Comparison], against: str) -> tuple[float, float] | None:
    """Returns the largest absolute and relative difference of a kind; None where there is none."""
    found = [each for each in comparisons if each.against == against]
    return (max(each.max_abs for each in found), max(each.max_rel for each in found)) if found else None


def _runner(file: Path, dtype: torch.dtype) -> Callable[[Call], list[Tensor]] | None:
    """Runs the file on a call; None for bfloat16, which onnxruntime has no arithmetic for on the CPU."""
    import onnxruntime

    if dtype is torch.bfloat16:
        log.warning("slcompile: onnxruntime has no bfloat16 arithmetic on the CPU: %s was not run there", file.name)
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: at 2 it reports each constant that it does not fold
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(call: Call) -> list[Tensor]:
        given = [each.to(dtype) if each.is_floating_point() else each for each in tensors_of((call.args, call.kwargs))]
        names = [each.name for each in session.get_inputs()]
        feeds = {name: each.detach().cpu().numpy() for name, each in zip(names, given, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feeds)]

    return run
