"""What a generated module launches, with which tensors: it is run on tensors that have shapes and no memory."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.codegen.generate import Generated

SOURCE = re.compile(r"^(\w+) = async_compile\.triton\('(?:\w+)', '''(.*?)'''", flags=re.S | re.M)
"""A kernel of a generated module: its name there, and its text."""


@dataclass
class Call:
    """A launch of a kernel, or a call of the vendor's library.

    Attributes:
        name: Of the kernel's function, or ``"extern_kernels.mm"``.
        arguments: By the names of its parameters, or by position.
        ours: Whether the kernel is one of ours.
        updated: The parameters that a kernel both reads and writes.
    """

    name: str
    arguments: dict[str, Any]
    ours: bool = False
    updated: frozenset[str] = frozenset()

    @property
    def written(self) -> list[Tensor]:
        """The tensors that it writes."""
        return [each for name, each in self._tensors() if self._writes(name)]

    @property
    def read(self) -> list[Tensor]:
        """The tensors that it reads."""
        return [each for name, each in self._tensors() if not self._writes(name) or name in self.updated]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, each) for name, each in self.arguments.items() if isinstance(each, Tensor)]

    def _writes(self, name: str) -> bool:
        if self.ours:
            return bool(re.match(WRITTEN[self.name], name))
        return name == "out" or name.startswith(("out_ptr", "in_out_ptr", "ws_ptr"))


WRITTEN = {
    "add_kernel": "p_matrix$",
    "read_kernel": "p_values$",
    "project_kernel": "p_partial$",
    "sum_splits_kernel": r"p_sum_\d$",
    "linear_factored_kernel": r"p_y_\d$",
    "linear_factored_transposed_kernel": "p_partial$",
    "vector_product_kernel": "p_y$",
    "vector_values_kernel": "p_partial$",
    "vector_blocks_kernel": "p_z$",
    "vector_order_kernel": "p_(order|begin)$",
    "vector_product_transposed_kernel": "p_y$",
}
"""Which parameters each of our kernels writes."""


def launches(generated: Generated) -> list[Call]:
    """Returns what a generated module calls."""
    return run(generated)[0]


def run(generated: Generated) -> tuple[list[Call], Any]:
    """Runs a generated module; returns what it calls, and its results.

    Raises:
        AssertionError: A launch of ours is told strides or sizes that its tensors do not have, a buffer is read that
            nothing has written, or a product gets matrices that do not fit.
    """
    recorder = _Recorder()
    code = generated.code
    begins = [code.index(each) for each in ("def partition_", "class Runner", "def call(") if each in code]
    ends = [code.index(each) for each in ("def get_args", "def benchmark_compiled_module") if each in code]
    body = re.sub(SOURCE, "", code[min(begins) : min(ends)])
    body = re.sub(r"^(async_compile|del async_compile|assert_alignment =|empty_strided_\w+ =).*$", "", body, flags=re.M)
    body = body.replace("torch.cuda._DeviceGuard(0)", "contextlib.nullcontext()")
    body = body.replace("torch.cuda.set_device(0)", "pass")
    kernels = {name: _Kernel(name, source, recorder) for name, source in SOURCE.findall(code)}
    space: dict[str, Any] = {
        "torch": torch,
        "contextlib": contextlib,
        "math": math,
        "aten": torch.ops.aten,
        "device": torch.device,
        "inf": math.inf,
        "nan": math.nan,
        "extern_kernels": _Library(recorder),
        "empty_strided_cuda": recorder.allocate,
        "empty_strided_cpu": recorder.allocate,
        "reinterpret_tensor": lambda tensor, size, stride, offset=0: torch.as_strided(tensor, size, stride, offset),
        "assert_size_stride": _assert_size_stride,
        "assert_alignment": lambda *args: None,
        "copy_if_misaligned": lambda tensor: tensor,
        "get_raw_stream": lambda index: 0,
        "run_intermediate_hooks": lambda *args: None,
        "start_graph": lambda: None,
        "end_graph": lambda *args: None,
        **kernels,
    }
    exec(body, space)
    inputs = [_empty(*each) if isinstance(each, tuple) else each for each in generated.inputs]
    results = space["call"](inputs)
    return recorder.calls, results


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _assert_size_stride(tensor: Tensor, size: Sequence[int], stride: Sequence[int], *_: Any) -> None:
    assert_layout(tensor, size, stride)


@dataclass
class _Recorder:
    """The calls so far, and the storages that the module allocated and nothing has written yet."""

    calls: list[Call] = field(default_factory=list)
    unwritten: dict[int, Any] = field(default_factory=dict)  # by address, which is theirs while they are held

    def allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = _empty(size, stride, dtype)
        if made.numel():
            storage = made.untyped_storage()
            self.unwritten[storage._cdata] = storage
        return made

    def add(self, call: Call) -> None:
        for tensor in call.read:
            assert tensor.untyped_storage()._cdata not in self.unwritten, f"{call.name} reads no number"
        for tensor in call.written:
            self.unwritten.pop(tensor.untyped_storage()._cdata, None)
        self.calls.append(call)


class _Kernel:
    """A Triton kernel of a generated module."""

    def __init__(self, name: str, source: str, recorder: _Recorder) -> None:
        self.ours = "custom_kernel=True" in source
        self.name = re.sub(r"_\d+$", "", name) if self.ours else name
        signature = re.search(rf"^def {self.name}\((.*?)\):", source, flags=re.S | re.M)
        assert signature is not None
        parameters = [each.strip() for each in re.sub(r"#.*", "", signature.group(1)).split(",") if each.strip()]
        self.parameters = [each for each in parameters if "tl.constexpr" not in each]
        loaded = re.findall(r"tl\.load\((\w+)", source)
        self.updated = frozenset(name for name in loaded if name.startswith(("in_out_ptr", "p_matrix")))
        self.recorder = recorder

    def run(self, *args: Any, stream: Any = None) -> None:
        call = Call(self.name, dict(zip(self.parameters, args, strict=False)), self.ours, self.updated)
        if self.ours:
            LAYOUTS[self.name](call.arguments)
        self.recorder.add(call)


class _Library:
    """The vendor's matmuls."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
            first, second = args[-2:]
            assert first.shape[-1] == second.shape[-2]
            assert (first.shape[-2], second.shape[-1]) == tuple(out.shape[-2:])
            named = {str(index): each for index, each in enumerate(args)}
            self.recorder.add(Call(f"extern_kernels.{name}", {**named, "out": out}))
            return out

        return call


def assert_layout(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
    """Asserts that a tensor has this shape and, where an axis has more than one element, these strides."""
    assert tuple(tensor.shape) == tuple(shape)
    pairs = zip(tensor.shape, tensor.stride(), strides, strict=True)
    assert all(size == 1 or actual == told for size, actual, told in pairs), (tensor.stride(), tuple(strides))


def _siblings(a: dict[str, Any], parameter: str) -> list[int]:
    return [index for index in range(4) if isinstance(a.get(f"{parameter}_{index}"), Tensor)]


def _check_entries(a: dict[str, Any]) -> None:
    rows, wide = a["p_matrix"].shape
    assert rows == a["rows"]
    assert wide >= a["columns"]
    assert_layout(a["p_matrix"], (rows, wide), (a.get("stride_row", 1), a.get("stride_column", 1)))
    assert a["p_values"].is_contiguous()
    assert a["p_values"].numel() == a["size"]
    assert a["p_values"].shape[-1] == a.get("groups", 1)


def _check_project(a: dict[str, Any]) -> None:
    assert_layout(a["p_x"], (a["tokens"], a["columns"]), (a["s_x_token"], a.get("s_x_column", 1)))
    for i in _siblings(a, "p_factor"):
        strides = a.get(f"s_rank_{i}", 1), a.get(f"s_column_{i}", 1)
        assert_layout(a[f"p_factor_{i}"], (a[f"ranks_{i}"], a["columns"]), strides)
    assert a["p_partial"].is_contiguous()


def _check_factored(a: dict[str, Any]) -> None:
    assert a["p_x"].is_contiguous()
    for i in _siblings(a, "p_factor"):
        rows, ranks = a[f"rows_{i}"], a[f"ranks_{i}"]
        assert_layout(a[f"p_factor_{i}"], (rows, ranks), (a.get(f"s_row_{i}", 1), a.get(f"s_rank_{i}", 1)))
        assert_layout(a[f"p_hidden_{i}"], (a["tokens"], ranks), (ranks, 1))
        assert_layout(a[f"p_y_{i}"], (a["tokens"], rows), (rows, 1))
        assert a[f"p_values_{i}"].is_contiguous()


def _check_transposed(a: dict[str, Any]) -> None:
    assert_layout(a["p_x"], (a["tokens"], a["rows"]), (a["s_x_token"], a.get("s_x_row", 1)))
    for i in _siblings(a, "p_factor"):
        ranks, columns = a[f"ranks_{i}"], a[f"columns_{i}"]
        assert_layout(a[f"p_factor_{i}"], (ranks, columns), (a.get(f"s_rank_{i}", 1), a.get(f"s_column_{i}", 1)))
        assert_layout(a[f"p_hidden_{i}"], (a["tokens"], ranks), (ranks, 1))
        assert a[f"p_values_{i}"].is_contiguous()
    assert a["p_partial"].is_contiguous()


def _check_sums(a: dict[str, Any]) -> None:
    assert a["p_partial"].is_contiguous()
    for i in _siblings(a, "p_sum"):
        assert a[f"p_sum_{i}"].is_contiguous()
        assert a[f"p_sum_{i}"].numel() == a[f"size_{i}"]


def _check_rows(tensor: Tensor, rows: int, stride: int, least: int) -> None:
    """Asserts that a matrix has so many rows, ``stride`` apart without a gap, of ``least`` elements or more."""
    assert_layout(tensor, (rows, stride), (stride, 1))
    assert stride >= least


def _check_vector_product(a: dict[str, Any]) -> None:
    tokens, rows, blocks, groups = a["tokens"], a["rows"], a.get("blocks", 1), a.get("groups", 1)
    _check_rows(a["p_hidden"], tokens, a.get("s_hidden", 1), a.get("ranks", 1))
    assert_layout(a["p_factor"], (rows, a.get("ranks", 1)), (a.get("s_row", 1), a.get("s_rank", 1)))
    _check_rows(a["p_x"], a["p_x"].shape[0], a["s_x"], tokens)
    _check_rows(a["p_columns"], blocks, groups, groups)
    _check_rows(a["p_values"], a["p_values"].shape[0], a["s_values"], groups)
    assert len(a["p_values"]) % blocks == 0
    assert len(a["p_values"]) >= rows
    _check_rows(a["p_y"], tokens, a["s_y"], rows)
    assert a["s_x"] % 16 == a["s_values"] % 64 == a["s_y"] % 16 == 0


def _check_vector_values(a: dict[str, Any]) -> None:
    _check_rows(a["p_left"], a["tokens"], a["s_left"], a["rows"])
    _check_rows(a["p_right"], a["p_right"].shape[0], a["s_right"], a["tokens"])
    assert a["p_partial"].is_contiguous()
    assert a["p_partial"].shape[1] == a["total"] == a["rows"] * a.get("groups", 1)
    assert a["p_columns"].shape[1] == a.get("groups", 1)
    assert a["s_left"] % 16 == a["s_right"] % 16 == 0


def _check_vector_blocks(a: dict[str, Any]) -> None:
    blocks, groups = a.get("blocks", 1), a.get("groups", 1)
    _check_rows(a["p_x"], a["tokens"], a["s_x"], len(a["p_values"]))
    _check_rows(a["p_values"], len(a["p_values"]), a["s_values"], groups)
    _check_rows(a["p_z"], blocks * groups, a["s_z"], a["tokens"])
    assert len(a["p_values"]) % blocks == a["s_x"] % 16 == a["s_z"] % 16 == a["s_values"] % 64 == 0


def _check_vector_order(a: dict[str, Any]) -> None:
    _check_rows(a["p_columns"], a.get("blocks", 1), a.get("groups", 1), 1)
    assert a["p_order"].numel() == a["p_columns"].numel()
    assert a["p_begin"].numel() == a["columns"] + 1


def _check_vector_transposed(a: dict[str, Any]) -> None:
    tokens, columns, ranks = a["tokens"], a["columns"], a.get("ranks", 1)
    _check_rows(a["p_hidden"], tokens, a.get("s_hidden", 1), ranks)
    factor = a["p_factor"]
    assert_layout(factor, (ranks, factor.shape[1]), (a.get("s_rank", 1), a.get("s_column", 1)))
    assert factor.shape[1] >= columns
    _check_rows(a["p_z"], a["p_order"].numel(), a["s_z"], tokens)
    _check_rows(a["p_y"], tokens, a["s_y"], columns)
    assert a["p_begin"].numel() == columns + 1
    assert a["s_z"] % 16 == a["s_y"] % 16 == 0


LAYOUTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "add_kernel": _check_entries,
    "read_kernel": _check_entries,
    "project_kernel": _check_project,
    "linear_factored_kernel": _check_factored,
    "linear_factored_transposed_kernel": _check_transposed,
    "sum_splits_kernel": _check_sums,
    "vector_product_kernel": _check_vector_product,
    "vector_values_kernel": _check_vector_values,
    "vector_blocks_kernel": _check_vector_blocks,
    "vector_order_kernel": _check_vector_order,
    "vector_product_transposed_kernel": _check_vector_transposed,
}
"""What each of our kernels takes its tensors' layouts for."""


def counted(calls: Sequence[Call]) -> Counter[str]:
    """How often each of our kernels, and the vendor's library (as ``"product"``), is called."""
    return Counter(
        "product" if "extern" in each.name else each.name for each in calls if each.ours or "extern" in each.name
    )


def large_writes(calls: Sequence[Call], elements: int) -> int:
    """How many matrices of at least so many elements are written by kernels that Inductor generated."""
    generated = [each for each in calls if not each.ours and "extern" not in each.name]
    return sum(tensor.numel() >= elements for each in generated for tensor in each.written)


def compiled_kernels(generated: Generated, folder: Any) -> Iterator[tuple[str, bool, Any, Any]]:
    """Compiles every kernel of a generated module as Inductor would on that GPU, with ptxas.

    Yields:
        Name, whether it is ours, what it takes, and the compiled kernel.
    """
    import importlib.util
    import sys

    from torch._inductor import config

    from slcompile.kernels.offline import resources
    from tests.codegen.pretend import pretended_h100

    static = [each for each in ("use_static_cuda_launcher", "use_static_triton_launcher") if hasattr(config, each)]
    with pretended_h100(), config.patch(dict.fromkeys(static, False)):
        for name, source in SOURCE.findall(generated.code):
            path = folder / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(f"generated_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            ours = "custom_kernel=True" in source
            tuner = getattr(module, re.sub(r"_\d+$", "", name) if ours else name)
            tuner.precompile(warm_cache_only=True)
            for result in tuner.compile_results:
                yield name, ours, resources(result.kernel), result.kernel
