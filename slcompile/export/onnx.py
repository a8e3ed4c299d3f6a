"""A trained model as an ordinary ONNX file with merged dense weights, checked against the model before it is kept."""

from __future__ import annotations

import json
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import files
from slcompile.config import require_int
from slcompile.export.call import Call
from slcompile.export.compact import compose_in_graph
from slcompile.export.twin import (
    MakeTensor,
    dense_tensors,
    export_dtype,
    meta_twin,
    reference,
    require_finite,
    state_hash,
    untouched_on_cpu,
)
from slcompile.export.verify import Comparison, compare_calls, require_close, require_same_weights, worst
from slcompile.factorize import factors
from slcompile.models import bare, positional, tensors_beside
from slcompile.weight.structure import weights_in

INSTALL = 'pip install "slcompile[onnx]"'
INLINE_LIMIT = 256 * 2**20
"""Weights of more bytes than this go into a file of their own: what is inline is held in memory, twice."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the trained model.

    Attributes:
        path: Of the model file.
        files: All files of the model, with their sizes in bytes.
        opset: Version of the ONNX operator set.
        dtype: Of the weights in the file.
        merged: Names of the factorized weights that the file holds, dense.
        absent: Names of those that it does not, because the exported graph does not read them.
        comparisons: Each output at each shape, of merged PyTorch and of onnxruntime, with the trained model's.
        metadata: What the file says of itself.
    """

    path: Path
    files: dict[Path, int]
    opset: int
    dtype: torch.dtype
    merged: tuple[str, ...]
    absent: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    metadata: dict[str, str]

    @property
    def max_abs(self) -> float | None:
        """Largest absolute difference of any output in onnxruntime; None if it was not run."""
        found = worst(self.comparisons, "onnxruntime")
        return found[0] if found else None

    @property
    def max_rel(self) -> float | None:
        """Largest relative difference of any output in onnxruntime; None if it was not run."""
        found = worst(self.comparisons, "onnxruntime")
        return found[1] if found else None

    def __str__(self) -> str:
        absent = f" ({len(self.absent)} not read by the graph)" if self.absent else ""
        lines = [
            f"{self.path.name}: opset {self.opset}, {self.metadata['dtype']}, {len(self.merged)} merged weights"
            f"{absent}, {sum(self.files.values()) / 1e6:.1f} MB in {len(self.files)} file{'s' * (len(self.files) > 1)}"
        ]
        for comparison in self.comparisons:
            agree = "" if comparison.same_argmax is None else f", arg-max equal at {comparison.same_argmax:.2%}"
            lines.append(
                f"  {comparison.against} against the trained model, {comparison.output} {list(comparison.shape)}: "
                f"largest difference {comparison.max_abs:.2e} absolute, {comparison.max_rel:.2e} relative{agree}"
            )
        if self.max_abs is None:
            lines.append("  not run in onnxruntime")
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    opset: int | None = None,
    verify: bool = True,
    compact: bool = False,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Writes a model with its factorized weights merged to dense, under their original names, in standard ONNX.

    The graph is exported from a twin on the meta device, and each weight is composed when it is written, so that the
    memory needed above the model's own is one dense weight. The file is made beside the target, checked by onnx, run
    by onnxruntime and compared with the trained model, its weights read again and compared with the factors; then it
    is moved into place. Weights beyond 256 MiB go into ``<stem>-<random>.data`` beside the model: never a name that the
    old model uses, so that an export which is killed leaves the old one whole.

    Args:
        model: Left as it is. A model without factorized weights is exported too.
        args, kwargs: What the model is called with.
        path: Of the model file.
        input_names, output_names: By default the names of the arguments, and the keys of the outputs where those are
            a mapping (transformers), with ``past_key_values.{i}.key`` and ``present.{i}.key`` for caches. One that is
            also a weight's gets ``input_`` or ``output_`` before it; so does an output that is named as an input.
        dynamic_shapes: As in ``torch.onnx.export``; then outputs are compared at a second shape, too.
        dtype: float32, float64, float16 or bfloat16; None is the model's, and float32 for a bfloat16 model, since
            onnxruntime has no bfloat16 arithmetic on the CPU.
        opset: ONNX operator set; None is torch's default.
        verify: Whether to run and re-read what was written. The structure is always checked.
        compact: Keep the factors in the file, composed by standard operators when the runtime folds constants at
            load: a smaller file, the same speed afterwards.
        shard_size: Most bytes in one file of weights.
        metadata: Further entries of the file's ``metadata_props``.
        progress: Called with (tensors written, tensors in all) where weights go into a file of their own.

    Raises:
        ValueError: ``path`` or an argument is not allowed, a weight holds NaN or Inf, the outputs differ by more than
            rounding. There is no new file then.
        OSError: The disk is full, or the files cannot be written. The old file is then as it was.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    _require_libraries()
    import onnx  # an extra

    path = files.writable_file(path)
    require_int("shard_size", shard_size, optional=True)
    if onnx.serialization.registry.get_format_from_file_extension(path.suffix) not in (None, "protobuf"):
        raise ValueError(
            f"path must not end in {path.suffix}, which is onnx's name for files of text; got {path.name!r}"
        )
    latest = onnx.defs.onnx_opset_version()
    _require_opset(opset, opset is None or 1 <= opset <= latest)  # before torch tries, which prints how that fails
    model = bare(model)
    for name, _ in model.named_modules():
        if not _UNWRITABLE.isdisjoint(name):
            raise ValueError(f"torch.onnx.export cannot write the name of module {name!r:.200}: rename it")
    dtype = export_dtype(model, dtype)
    require_finite(model)
    args = positional(args)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata must map strings to strings, got {key!r}: {value!r}")
    trained = reference(model, dtype)
    call = Call.of(model, args, dict(kwargs or {}), dynamic_shapes).with_outputs(trained)

    twin = meta_twin(model, dtype)
    tensors = dense_tensors(model, twin)
    call = call.renamed(input_names, output_names, tensors.keys())
    if not all(each.is_meta for module in twin.modules() for each in tensors_beside(module)):
        untouched_on_cpu(twin)  # to be where they are
    graph = _dense_graph(twin, call, opset)
    if _without_value(graph, tensors):
        untouched_on_cpu(twin)
        graph = _dense_graph(twin, call, opset)
    names = tuple(factors(model))
    stored = _stored(twin, names, graph.graph.initializers)
    _fill(graph, tensors)
    if compact:
        compose_in_graph(graph, model, twin)
    with files.beside(path) as scratch:
        file = scratch / path.name
        _save(graph, file, f"{path.stem}-{secrets.token_hex(6)}.data", shard_size, progress)
        comparisons = _checked(file, trained, call, dtype, tensors) if verify else []
        described = _description(model, dtype, comparisons) | dict(metadata or {})
        _describe(file, described)
        sizes = {path.parent / each.name: each.stat().st_size for each in scratch.iterdir()}
        files.move_into_place(scratch, path.parent, last=path.name, stale=_data_files(path))
    absent = tuple(name for name in names if name not in stored)
    opset_version = graph.opset_imports[""]
    return ExportReport(path, sizes, opset_version, dtype, stored, absent, tuple(comparisons), described)


def _checked(
    file: Path, trained: nn.Module, call: Call, dtype: torch.dtype, tensors: Mapping[str, MakeTensor]
) -> list[Comparison]:
    """Reads the weights back and compares the outputs at one shape or two; raises ValueError where they differ."""
    require_same_weights(file, tensors)
    comparisons = compare_calls(trained, [call, *call.resized(trained)], dtype, file)
    require_close(comparisons, dtype)
    return comparisons


def _description(model: nn.Module, dtype: torch.dtype, comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Returns what the file says of itself."""
    described = {
        "producer": f"slcompile {version('slcompile')}",
        "dtype": str(dtype).removeprefix("torch."),
        "state_sha256": state_hash(model),
        "factorized_weights": str(len(factors(model))),
        "factorization": _factorization(model),
    }
    for against in ("merged", "onnxruntime"):
        if found := worst(comparisons, against):
            described |= {f"{against}_max_abs": f"{found[0]:.3e}", f"{against}_max_rel": f"{found[1]:.3e}"}
    return described


def _factorization(model: nn.Module) -> str:
    """Returns the distinct settings of a model's factorized weights, as JSON."""
    settings = {json.dumps({"structure": each.structure, **each.describe()}) for each in weights_in(model)}
    return f"[{', '.join(sorted(settings))}]"


_UNWRITABLE = frozenset('"\\\n\r')
"""What torch's generated code does not quote."""

_exporting = threading.Lock()
"""torch says to the whole process that it exports, and where two threads do, may go on saying so. Python 3.11 parses
sources, of which torch's exporter parses its operators', in one thread at a time."""


def _require_opset(opset: int | None, is_one: bool) -> None:
    """Raises ValueError for an operator set that there is not."""
    if not is_one:
        raise ValueError(f"opset must be one to which this torch converts graphs, got {opset}; nothing was written")


def _dense_graph(twin: nn.Module, call: Call, opset: int | None) -> Any:
    """Returns the twin's graph as an ``onnx_ir.Model`` of standard operators; its weights have no values yet."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    args, kwargs = call.on(twin)
    with warnings.catch_warnings():
        # At every export: torch's own use of its pytree, and a remark on arguments that are no tensors.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*different number of inputs")
        # Optimizing would fold weights into anonymous, transposed copies; the runtime does that when it loads.
        with _exporting, torch.autocast("cpu", enabled=False):
            program = torch.onnx.export(
                twin,
                args,
                kwargs=kwargs,
                input_names=list(call.input_names),  # of outputs below: torch would rename a weight that is one
                dynamic_shapes=call.shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    assert program is not None
    _require_opset(opset, opset in (None, program.model.opset_imports.get("")))
    # torch names the axes itself only where every argument is a tensor.
    renamed: dict[Any, str] = {}
    for value, names in zip(program.model.graph.inputs, call.axis_names, strict=True):
        assert value.shape is not None
        renamed |= {value.shape[dim]: name for dim, name in names.items()}
    program.rename_axes(renamed)
    _name_apart(program.model.graph, call)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces hold paths of this machine
    domains = {node.domain for node in program.model.graph.all_nodes()} - {"", "ai.onnx"}
    if domains or program.model.functions:
        raise ValueError(f"the model needs operators beyond standard ONNX, of {sorted(domains)}; nothing was written")
    return program.model


def _name_apart(graph: Any, call: Call) -> None:
    """Gives an output that is also an input, a weight or another output a value of its own, and each its name."""
    import onnx_ir as ir

    taken = {*graph.inputs, *graph.initializers.values()}
    for position, value in enumerate(list(graph.outputs)):
        if value in taken:
            copied = ir.node("Identity", [value])
            graph.append(copied)
            graph.outputs[position] = copied.outputs[0]
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
        taken.add(value)
    names, ends = {*call.input_names, *call.output_names}, {*graph.inputs, *graph.outputs}
    for value in (value for node in graph.all_nodes() for value in node.outputs):
        if value.name in names and value not in ends:
            value.name = f"inner.{value.name}"
    for value, name in zip((*graph.inputs, *graph.outputs), (*call.input_names, *call.output_names), strict=True):
        value.name = name


def _without_value(graph: Any, tensors: Mapping[str, MakeTensor]) -> list[str]:
    """Returns the initializers that are no tensors of the model, and were traced on the meta device."""
    values = ((name, each.const_value) for name, each in graph.graph.initializers.items() if name not in tensors)
    return [name for name, value in values if getattr(value.raw, "is_meta", False)]


def _fill(graph: Any, tensors: Mapping[str, MakeTensor]) -> None:
    """Gives the initializers, which have none, values that are made when they are written."""
    import onnx_ir as ir

    def lazy(name: str, like: Any) -> Any:
        make = tensors[name]
        return ir.LazyTensor(
            lambda: ir.tensor_adapters.TorchTensor(make(), name), dtype=like.dtype, shape=like.shape, name=name
        )

    if missing := _without_value(graph, tensors):
        raise ValueError(f"the constant {missing[0]} of the graph is no parameter or buffer; register it as a buffer")
    for name, value in graph.graph.initializers.items():
        if name in tensors:
            value.const_value = lazy(name, value.const_value)


def _save(
    graph: Any, file: Path, data: str, shard_size: int | None, progress: Callable[[int, int], None] | None
) -> None:
    """Writes model and weights, the latter one at a time where they go into files of their own; checks the model."""
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    files.require_space(file.parent, size)
    external: dict[str, Any] = {}
    if size > INLINE_LIMIT or shard_size is not None:
        external = {"external_data": data, "max_shard_size_bytes": shard_size}
        if progress is not None:
            external["callback"] = lambda tensor, info: progress(info.index + 1, info.total)
    ir.save(graph, file, **external)
    onnx.checker.check_model(str(file))


def _describe(file: Path, metadata: Mapping[str, str]) -> None:
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, str(file))


def _data_files(path: Path) -> set[str]:
    """Returns names of the files of weights of the model that is at ``path`` now; none where it is no ONNX model."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.exists():
        return set()
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return set()
    entries = [entry for each in proto.graph.initializer for entry in each.external_data]
    locations = {entry.value for entry in entries if entry.key == "location"}
    return {name for name in locations if Path(name).name == name and name.startswith(f"{path.stem}-")}


def _stored(twin: nn.Module, names: Sequence[str], initializers: Iterable[str]) -> tuple[str, ...]:
    """Returns which of these weights the file holds by name: a tied one is stored once, under one of its names."""
    parameters = {name: id(parameter) for name, parameter in twin.named_parameters(remove_duplicate=False)}
    stored = {parameters[name] for name in initializers if name in parameters}
    return tuple(name for name in names if parameters[name] in stored)


def _require_libraries() -> None:
    try:
        import onnx  # noqa: F401, they are only looked for here
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401, torch.onnx.export needs it and says so less clearly
    except ImportError as error:
        raise ImportError(f"exporting needs {error.name}: {INSTALL}") from error
