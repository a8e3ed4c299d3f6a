"""A trained model as an ordinary ONNX file with merged dense weights, checked against the model before it is kept."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slcompile.factorize import factors, merge_, unwrapped

INSTALL = 'pip install "slcompile[onnx]"'


@dataclass(frozen=True)
class OutputError:
    """Difference of one output between the trained model and onnxruntime.

    Attributes:
        name: Of the ONNX output.
        max_abs: Largest absolute difference.
        max_rel: The same, divided by the largest magnitude in the trained model's output.
    """

    name: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far onnxruntime's outputs are from the trained model's.

    Attributes:
        path: Of the model file.
        opset: Version of the ONNX operator set.
        merged: Names of the factorized weights that the file holds, dense.
        absent: Names of those that it does not, because the exported graph does not read them.
        bytes_written: Size of all files.
        outputs: The difference of each output.
    """

    path: Path
    opset: int
    merged: tuple[str, ...]
    absent: tuple[str, ...]
    bytes_written: int
    outputs: tuple[OutputError, ...]

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all outputs."""
        return max(each.max_abs for each in self.outputs)

    @property
    def max_rel(self) -> float:
        """Largest relative difference over all outputs."""
        return max(each.max_rel for each in self.outputs)

    def __str__(self) -> str:
        absent = f" ({len(self.absent)} not read by the graph)" if self.absent else ""
        return (
            f"{self.path.name}: opset {self.opset}, {len(self.merged)} merged weights{absent}, "
            f"{self.bytes_written / 1e6:.1f} MB; "
            f"onnxruntime against the trained model: largest difference {self.max_abs:.2e} absolute, "
            f"{self.max_rel:.2e} relative"
        )


def export_onnx(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Writes a model with its factorized weights merged to dense, under their original names, in standard ONNX.

    The model is copied, put into eval mode, merged and exported; the file is checked by onnx, run by onnxruntime on
    the same arguments, and moved to ``path`` only if its outputs agree with the trained model's. bfloat16 models are
    exported in float32, since onnxruntime has no bfloat16 arithmetic on the CPU.

    Args:
        model: Left as it is. A model without factorized weights is exported too.
        args, kwargs: What the model is called with.
        path: Of the file. Weights beyond 2 GB go into ``<path>.data`` beside it.
        input_names, output_names, dynamic_shapes: As in ``torch.onnx.export``.
        opset: ONNX operator set; None is torch's default.
        tolerance: Largest difference that is accepted, relative to the largest magnitude in the output.

    Raises:
        ValueError: ``path`` is a directory or cannot be written, a weight holds NaN or Inf, or the outputs differ by
            more than the tolerance. There is no new file then.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    onnx, onnxruntime = _libraries()
    path = _writable(path)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    twin = copy.deepcopy(unwrapped(model)).eval()
    if any(tensor.dtype is torch.bfloat16 for tensor in twin.parameters()):
        twin.float()
    with torch.no_grad():
        expected = [each for each in tree_leaves(twin(*args, **kwargs)) if isinstance(each, Tensor)]
    names = tuple(factors(twin))
    merge_(twin)
    for name, parameter in twin.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"weight {name} contains NaN or Inf; nothing was written")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its pytree, at every export
        program = torch.onnx.export(
            twin,
            args,
            kwargs=kwargs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            # Optimizing would fold weights into anonymous, transposed copies; the runtime does that when it loads.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _strip_metadata(program.model)
    _require_standard(program.model)
    stored = _stored(twin, names, program.model.graph.initializers)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        file = Path(scratch) / path.name
        program.save(file)
        onnx.checker.check_model(str(file))
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3  # errors: at 2 it reports each constant that it does not fold
        session = onnxruntime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        feeds = {
            node.name: each.detach().cpu().numpy() for node, each in zip(session.get_inputs(), inputs, strict=True)
        }
        outputs = [node.name for node in session.get_outputs()]
        errors = tuple(
            _difference(name, torch.from_numpy(got), want)
            for name, got, want in zip(outputs, session.run(outputs, feeds), expected, strict=True)
        )
        for error in errors:
            if not error.max_rel <= tolerance:  # also where it is NaN
                raise ValueError(
                    f"output {error.name} differs from the trained model by {error.max_rel:.2e} relative, more than "
                    f"the tolerance {tolerance:.0e}; nothing was written"
                )
        files = sorted(Path(scratch).iterdir(), key=lambda each: each == file)  # the model last: it refers to the data
        written = sum(each.stat().st_size for each in files)
        for each in files:
            os.replace(each, path.parent / each.name)
    absent = tuple(name for name in names if name not in stored)
    return ExportReport(path, program.model.opset_imports[""], stored, absent, written, errors)


def _difference(name: str, got: Tensor, want: Tensor) -> OutputError:
    want = want.detach().cpu()
    if got.shape != want.shape:
        raise ValueError(f"output {name} has shape {tuple(got.shape)}, the trained model's {tuple(want.shape)}")
    largest = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = want.double().abs().max().item() if want.numel() else 0.0
    return OutputError(name, largest, largest / scale if scale else largest)


def _require_standard(model: Any) -> None:
    domains = {node.domain for node in model.graph.all_nodes()} - {"", "ai.onnx"}
    if domains or model.functions:
        raise ValueError(
            f"the model needs operators that are not standard ONNX, of {sorted(domains)}; nothing was written"
        )


def _stored(twin: nn.Module, names: Sequence[str], initializers: Iterable[str]) -> tuple[str, ...]:
    """Which of these weights the file holds by name: a tied one is stored once, under one of its names."""
    parameters = {name: id(twin.get_parameter(name)) for name in names}
    stored = {parameters[name] for name in initializers if name in parameters}
    return tuple(name for name in names if parameters[name] in stored)


def _strip_metadata(model: Any) -> None:
    """Removes stack traces: they hold paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)


def _writable(path: str | os.PathLike[str]) -> Path:
    path = Path(path).absolute()
    if path.is_dir():
        raise ValueError(f"path must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise ValueError(f"path's directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"path's directory {path.parent} cannot be written")
    return path


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, torch.onnx.export needs it and says so less clearly
    except ImportError as error:
        raise ImportError(f"exporting needs {error.name}: {INSTALL}") from error
    return onnx, onnxruntime
