"""What the factored lowering runs on CPU for the vector support: S times matrices with a row a token, in C++.

The rows of a block share their columns, so S times a tile of tokens is a product of small dense matrices, one of whose
operands is read through the columns: ``kernels/vector.cpp``. It takes and makes matrices as other matmuls do, and no
transposed copy is needed. Inductor's compiler compiles it, once for each dtype and length of blocks, beside the rest of
a graph that will run it (``begin_compiling``), else when it is first run; it lies in Inductor's cache. The columns of
the blocks are kept: 4 bytes for ``vector`` non-zeros.

One token's products take some 50 µs, which is why calls are short here: ops without ``custom_op``'s layers of Python,
and ``out=``, which autocast leaves alone, in the place of a context.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.ops.register_op import register_op
from slcompile.ops.sparse_cpu import kept
from slcompile.ops.support import block_columns

_TAGS = (torch.Tag.needs_contiguous_strides,)
_SOURCE = Path(__file__).parents[1] / "kernels" / "vector.cpp"
_TILES_SOURCE = _SOURCE.with_name("vector_amx.cpp")
FEW_TOKENS = {"product": 16, "transposed": 4, "dots": 4}
"""Up to so many tokens, factor and values are read as they lie, and nothing is multiplied in tiles."""
_STORED = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@register_op("CPU", _TAGS)
def vector_addmm(
    factor: Tensor,
    hidden: Tensor,
    values: Tensor,
    support: Tensor,
    x: Tensor,
    bias: Tensor | None,
    transposed: bool,
    vector: int,
) -> Tensor:
    """Computes ``hidden @ factor^T + x @ S^T + bias``, or ``hidden @ factor + x @ S`` where ``transposed``.

    Args:
        factor: B [N, R], or A [R, K] where ``transposed``.
        hidden: [T, R], like x.
        values: [N, groups] of S [N, K], like x.
        support: The seed.
        x: [T, K], or [T, N] where ``transposed``; float32, bfloat16, float16 or float64.
        bias: [N], or [K] where ``transposed``; added to each row.
        transposed: Whether S and not its transpose multiplies x.
        vector: Rows of S that share their columns.

    Returns:
        [T, N], or [T, K] where ``transposed``, contiguous.
    """
    if x.dtype not in _STORED:
        factor, hidden, values, wide = (each.float() for each in (factor, hidden, values, x))
        bias = None if bias is None else bias.float()
        return vector_addmm(factor, hidden, values, support, wide, bias, transposed, vector).to(x.dtype)
    writing = factor if transposed else factor.t()
    (tokens, width), outputs, (rows, groups) = x.shape, writing.shape[1], values.shape
    columns = outputs if transposed else width
    result = x.new_empty(tokens, outputs)
    x, values = _with_rows(x), values.contiguous()
    function, takes_factor = _function("transposed" if transposed else "product", x, vector)
    if not takes_factor or x.numel() == 0:
        if bias is None:
            torch.mm(hidden, writing, out=result)
        else:
            torch.addmm(bias, hidden, writing, out=result)
    if x.numel() == 0:
        return result
    blocks = kept_columns(values, support, columns, vector)
    of_factor: tuple[int | None, ...] = ()
    if takes_factor:
        hidden, factor, bias = _with_rows(hidden), _with_rows(factor), bias if bias is None else bias.contiguous()
        of_bias = None if bias is None else bias.data_ptr()
        of_factor = (
            hidden.data_ptr(), hidden.stride(0), factor.data_ptr(), factor.stride(0), hidden.shape[1], of_bias,
        )  # fmt: skip
    function(
        *of_factor, x.data_ptr(), x.stride(0), values.data_ptr(), blocks.data_ptr(), result.data_ptr(), outputs,
        tokens, rows, columns, groups, torch.get_num_threads(),
    )  # fmt: skip
    return result


@torch.library.register_fake("slcompile::vector_addmm")
def _(factor, hidden, values, support, x, bias, transposed, vector):
    return x.new_empty((x.shape[0], factor.shape[1 if transposed else 0]))


@register_op("CPU", _TAGS)
def vector_dots(left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int) -> Tensor:
    """Computes ``left^T @ right`` at the support.

    Args:
        left: [T, N].
        right: [T, K], of the same dtype.
        values, support, vector: As for ``vector_addmm``; the numbers of ``values`` are not read.

    Returns:
        Shape and dtype of ``values``.
    """
    if left.dtype not in _STORED:
        return vector_dots(left.float(), right.float(), values, support, vector)
    if left.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    left, right = _with_rows(left), _with_rows(right)
    result = left.new_empty(values.shape, dtype=torch.promote_types(left.dtype, torch.float32))
    (tokens, rows), (_, columns) = left.shape, right.shape
    blocks = kept_columns(values, support, columns, vector)
    function, _ = _function("dots", left, vector)
    function(
        left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), blocks.data_ptr(), result.data_ptr(),
        tokens, rows, columns, values.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return result.to(values.dtype)


@torch.library.register_fake("slcompile::vector_dots")
def _(left, right, values, support, vector):
    return torch.empty_like(values).contiguous()


def _with_rows(matrix: Tensor) -> Tensor:
    """Returns the matrix, with the elements of each row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def kept_columns(values: Tensor, support: Tensor, columns: int, vector: int) -> Tensor:
    """Returns ``block_columns`` of a weight whose values are [rows, groups], as int32, made once for a support."""
    return kept(_making(vector), values, support, values.shape[0], columns)[0]


@functools.cache
def _making(vector: int) -> Callable[[Tensor, Tensor, int, int], tuple[Tensor]]:
    def columns_of_blocks(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor]:
        return (block_columns(support, rows, columns, values.shape[1], vector).int(),)

    return columns_of_blocks


@functools.cache
def _compiled(name: str, dtype: torch.dtype, vector: int, few: bool) -> tuple[Any, bool]:
    """Returns a compiled function, and whether it multiplies with the factor, too, and does not add to that product."""
    library, has_tiles = _library(dtype, vector)
    has_tiles &= not few
    takes_factor = has_tiles or (few and name == "product")
    if name == "dots":
        function = library.dots_amx if has_tiles else library.dots
        function.argtypes = (c_void_p, c_int64) * 2 + (c_void_p,) * 2 + (c_int64,) * 5
    else:
        whole = "product_of_few" if few else name
        function = getattr(library, whole if takes_factor else f"add_{name}")
        of_factor = (c_void_p, c_int64) * 2 + (c_int64, c_void_p) if takes_factor else ()
        function.argtypes = of_factor + (c_void_p, c_int64) + (c_void_p,) * 3 + (c_int64,) * 6
    function.restype = None
    return function, takes_factor


def _function(name: str, x: Tensor, vector: int) -> tuple[Any, bool]:
    return _compiled(name, x.dtype, vector, x.shape[0] <= FEW_TOKENS[name])


_MULTIPLIED = {vector_addmm: 4, vector_dots: 0}
"""Position among an op's arguments of a matrix whose dtype the products have."""


def begin_compiling(graph: fx.Graph) -> None:
    """Compiles what a graph calls, in threads of their own; a call that comes before they end waits for them."""
    for node in graph.nodes:
        if (position := _MULTIPLIED.get(node.target)) is not None:
            _begin_compiling(node.args[position].meta["val"].dtype, node.args[-1])


@functools.cache
def _begin_compiling(dtype: torch.dtype, vector: int) -> None:
    def compile_library() -> None:
        with contextlib.suppress(Exception):  # the call that needs it raises it again
            _library(dtype if dtype in _STORED else torch.float32, vector)

    threading.Thread(target=compile_library, name="slcompile vector.cpp", daemon=True).start()


@functools.cache
def _library(dtype: torch.dtype, vector: int) -> tuple[Any, bool]:
    """Returns the compiled functions, and whether there are those for AMX."""
    source = f"#define VECTOR {vector}\n#define STORED {_STORED[dtype]}\n" + _SOURCE.read_text()
    if dtype == torch.bfloat16 and vector >= 16 and torch_private.has_amx():
        library = torch_private.cpp_library(source + _TILES_SOURCE.read_text())
        if library.may_use_tiles():
            return library, True
    return torch_private.cpp_library(source), False
