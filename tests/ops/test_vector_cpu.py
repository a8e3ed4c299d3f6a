from __future__ import annotations

import ctypes
import importlib.resources
import itertools
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slcompile import torch_private
from slcompile.ops import compose_reference, sparse_cpu, vector_cpu
from slcompile.ops.sparse_cpu import kept_bytes
from slcompile.ops.support import groups_per_row
from slcompile.ops.vector_cpu import vector_addmm, vector_dots
from tests.testing import some_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Below, at and above the lanes of a register, in each dtype; each is a library that a compiler makes, except that
# float16 is multiplied in float32.
VECTORS = some_of(
    itertools.product((2, 4, 8, 16, 32, 64, 128), DTYPES),
    [(2, torch.float32), (2, torch.float16), *((16, each) for each in DTYPES), (128, torch.bfloat16)],
)
# rows, columns: blocks that are whole and not, nothing divides anything, and the smallest there is.
SHAPES = [(128, 64), (131, 150), (33, 65), (1, 9), (9, 1)]
# Of few tokens values are read as they lie; tiles have 8 or 16.
TOKENS = (1, 4, 5, 16, 17, 63)
RANK = 3


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' seeds may be alive."""
    monkeypatch.setattr(sparse_cpu, "_memory", type(sparse_cpu._memory)())


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scattered(values: Tensor, seed: Tensor, columns: int, vector: int) -> Tensor:
    """S, dense."""
    B, A = values.new_zeros(values.shape[0], 1), values.new_zeros(1, columns)
    return compose_reference(B, A, values, seed, 0.0, vector)


def assert_close(found: Tensor, exact: Tensor, eager: Tensor, magnitude: Tensor) -> None:
    """As exact as the same in plain torch, in the operands' dtype, up to half a unit in the last place of the sums of
    the terms' absolute values, ``magnitude``. BLAS sums in several pieces: one long sum loses more."""
    assert (found.shape, found.dtype) == (eager.shape, eager.dtype)
    slack = torch.finfo(eager.dtype).eps / 2 * float(magnitude.norm()) * (8 if eager.dtype == torch.float64 else 1)
    assert float((found.double() - exact).norm()) <= float((eager.double() - exact).norm()) + slack


def addmm_operands(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    transposed: bool,
    density: float = 0.1,
    bias: bool = False,
    rank: int = RANK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    rows, columns = shape
    terms, outputs = (rows, columns) if transposed else (columns, rows)
    return (
        random(rank, outputs, dtype=dtype) if transposed else random(outputs, rank, dtype=dtype),
        random(tokens, rank, dtype=dtype, seed=1),
        random(rows, groups_per_row(columns, density), dtype=dtype, seed=2),
        torch.tensor([5]),
        random(tokens, terms, dtype=dtype, seed=4),
        random(outputs, dtype=dtype, seed=6) if bias else None,
    )


def dense_addmm(
    factor: Tensor, hidden: Tensor, values: Tensor, seed: Tensor, x: Tensor, bias: Tensor | None, transposed: bool,
    vector: int,
) -> Tensor:  # fmt: skip
    S = scattered(values, seed, factor.shape[1] if transposed else x.shape[1], vector)
    y = hidden @ (factor if transposed else factor.t()) + x @ (S if transposed else S.t())
    return y if bias is None else y + bias


def wide(operands: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [each.double() if each is not None and each.is_floating_point() else each for each in operands]


def absolute(operands: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [each.abs() if each is not None and each.is_floating_point() else each for each in wide(operands)]


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("vector", "dtype"), VECTORS, ids=str)
def test_addmm_is_its_formula(vector: int, dtype: torch.dtype, transposed: bool) -> None:
    for shape in SHAPES:
        for tokens in TOKENS:
            for density in (0.1, 1.0):
                operands = addmm_operands(shape, tokens, dtype, transposed, density, bias=density < 1)
                found = vector_addmm(*operands, transposed, vector)
                assert found.is_contiguous()
                exact, eager, magnitude = (
                    dense_addmm(*each, transposed, vector) for each in (wide(operands), operands, absolute(operands))
                )
                assert_close(found, exact, eager, magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_few_tokens_read_factors_of_any_rank_and_layout_once(tokens: int, dtype: torch.dtype) -> None:
    """A rank below, at and above the lanes of registers; rows of a wider matrix, of which nothing else may be read."""
    for rank in (1, 16, 17, 150):
        factor, *rest = operands = addmm_operands((131, 150), tokens, dtype, False, bias=True, rank=rank)
        exact, eager, magnitude = (
            dense_addmm(*each, False, 16) for each in (wide(operands), operands, absolute(operands))
        )
        around = torch.full((131, rank + 5), float("nan"), dtype=dtype)
        around[:, 2:-3] = factor
        for each in (factor, around[:, 2:-3], factor.t().contiguous().t()):
            assert_close(vector_addmm(each, *rest, False, 16), exact, eager, magnitude)


@pytest.mark.slow
@pytest.mark.parametrize(("vector", "dtype"), VECTORS, ids=str)
def test_dots_are_the_products_entries(vector: int, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            for density in (0.1, 1.0):
                left, right = random(tokens, rows, dtype=dtype), random(tokens, columns, dtype=dtype, seed=1)
                # Its numbers may not be read.
                values, seed = left.new_full((rows, groups_per_row(columns, density)), float("nan")), torch.tensor([5])
                found = vector_dots(left, right, values, seed, vector)
                where = scattered(torch.ones_like(values), seed, columns, vector) != 0
                exact, eager, magnitude = (
                    (a.t() @ b)[where].view_as(values)
                    for a, b in (wide((left, right)), (left, right), absolute((left, right)))
                )
                assert_close(found, exact, eager, magnitude)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for transposed in (False, True):
            for tokens in (1, 5, 200):
                operands = addmm_operands((131, 150), tokens, torch.float64, transposed)
                found, exact = (f(*operands, transposed, 16) for f in (vector_addmm, dense_addmm))
                assert_close(found, exact, exact, dense_addmm(*absolute(operands), transposed, 16))
        left, right, values = random(200, 131), random(200, 150, seed=1), random(131, 15)
        found = vector_dots(left, right, values, torch.tensor([5]), 16)
        where = scattered(torch.ones_like(values), torch.tensor([5]), 150, 16) != 0
        exact, magnitude = ((a.t() @ b)[where].view_as(values) for a, b in ((left, right), absolute((left, right))))
        assert_close(found, exact, exact, magnitude)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63])
def test_rows_of_a_wider_matrix_and_columns_of_a_transposed_one(tokens: int, dtype: torch.dtype) -> None:
    factor, hidden, values, seed, x, _ = addmm_operands((33, 65), tokens, dtype, False)
    expected = vector_addmm(factor, hidden, values, seed, x, None, False, 8)
    for strided in (torch.cat([x, x], 1)[:, :65], x.t().contiguous().t()):
        assert torch.equal(vector_addmm(factor, hidden, values, seed, strided, None, False, 8), expected)
        left = torch.cat([hidden, random(tokens, 30, dtype=dtype)], 1)
        every = left, torch.cat([left, left], 1)[:, :33], left.t().contiguous().t()
        first, *others = (vector_dots(each, strided, values, seed, 8) for each in every)
        assert all(torch.equal(first, each) for each in others)


@pytest.mark.parametrize("tokens", [1, 63])
def test_infinities_stay_with_their_tokens_rows_and_columns(tokens: int) -> None:
    """What is not there, a block's missing rows and a tile's missing tokens, is never multiplied with what is."""
    factor, hidden, values, seed, x, _ = addmm_operands((33, 65), tokens, torch.float32, False)
    S = scattered(torch.ones_like(values), seed, 65, 8)
    x[-1, 7] = float("inf")
    found = vector_addmm(factor, hidden, values, seed, x, None, False, 8)
    assert bool(found[:-1].isfinite().all())
    assert torch.equal(found[-1].isfinite(), S[:, 7] == 0)
    values[4, 2] = float("nan")
    g = random(tokens, 33, dtype=torch.float32)
    found = vector_addmm(random(RANK, 65, dtype=torch.float32), hidden, values, seed, g, None, True, 8)
    assert bool(found.isnan().any(0).sum() == 1)


def test_autocast_changes_nothing() -> None:
    operands = addmm_operands((33, 65), 5, torch.float32, False, bias=True)
    expected = vector_addmm(*operands, False, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vector_addmm(*operands, False, 16), expected)


@pytest.fixture
def nothing_compiled() -> Iterator[Callable[[], None]]:
    """Forgets which functions were chosen, before and after."""

    def forget() -> None:
        vector_cpu._library.cache_clear()
        vector_cpu._compiled.cache_clear()
        vector_cpu._begin_compiling.cache_clear()

    yield forget
    forget()


def test_what_was_begun_to_be_compiled_is_what_a_call_waits_for(
    monkeypatch: pytest.MonkeyPatch, nothing_compiled: Callable[[], None]
) -> None:
    begun, real = [], torch_private.cpp_library

    def library(source: str) -> Any:
        begun.append(threading.current_thread().name)
        return real(source)

    monkeypatch.setattr(torch_private, "cpp_library", library)
    nothing_compiled()
    vector_cpu._begin_compiling(torch.float16, 32)  # multiplied in float32
    vector_cpu._begin_compiling(torch.float16, 32)
    for thread in threading.enumerate():
        if thread.name == "slcompile vector.cpp":
            thread.join()
    assert begun == ["slcompile vector.cpp"]
    operands = addmm_operands((33, 65), 5, torch.float16, False)
    exact, eager, magnitude = (dense_addmm(*each, False, 32) for each in (wide(operands), operands, absolute(operands)))
    assert_close(vector_addmm(*operands, False, 32), exact, eager, magnitude)
    assert len(begun) == 1


def test_what_cannot_be_compiled_is_an_error_of_the_call_alone(
    monkeypatch: pytest.MonkeyPatch, nothing_compiled: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def library(source: str) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch_private, "cpp_library", library)
    nothing_compiled()
    vector_cpu._begin_compiling(torch.float32, 32)
    for thread in threading.enumerate():
        if thread.name == "slcompile vector.cpp":
            thread.join()
    assert "no compiler" not in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="no compiler"):
        vector_addmm(*addmm_operands((33, 65), 5, torch.float32, False), False, 32)


@pytest.mark.parametrize("vector", [16, 64])
def test_tiles_and_vectors_agree(
    vector: int, monkeypatch: pytest.MonkeyPatch, nothing_compiled: Callable[[], None]
) -> None:
    """Where AMX multiplies bfloat16, what other CPUs run is tested, too; AMX's result is rounded once, not twice."""
    if not torch_private.has_amx():
        pytest.skip("this CPU has no AMX")
    left, right = random(63, 131, dtype=torch.bfloat16), random(63, 150, dtype=torch.bfloat16, seed=1)
    values, seed = left.new_zeros(131, groups_per_row(150, 0.3)).float(), torch.tensor([5])
    factored = [
        (*addmm_operands((131, 150), 63, torch.bfloat16, transposed, 0.3, bias=True, rank=70), transposed, vector)
        for transposed in (False, True)
    ]
    dots, errors = {}, {}
    for has_tiles in (True, False):
        monkeypatch.setattr(torch_private, "has_amx", lambda answer=has_tiles: answer)
        nothing_compiled()
        assert vector_cpu._library(torch.bfloat16, vector)[1] == has_tiles
        dots[has_tiles] = vector_dots(left, right, values, seed, vector)
        errors[has_tiles] = [
            float((vector_addmm(*each).double() - dense_addmm(*wide(each[:6]), *each[6:])).norm()) for each in factored
        ]
    torch.testing.assert_close(dots[True], dots[False], rtol=1e-5, atol=1e-4)
    assert all(tiles <= vectors for tiles, vectors in zip(errors[True], errors[False], strict=True)), errors


@pytest.mark.long
@pytest.mark.parametrize("march", ["haswell", "x86-64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_processors_with_shorter_registers(
    dtype: torch.dtype,
    march: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_compiled: Callable[[], None],
) -> None:
    """AVX2, and what every x86 has: Inductor always compiles for the processor that is there."""
    if platform.machine() != "x86_64":
        pytest.skip("another processor's instructions")

    def compiled(source: str) -> ctypes.CDLL:
        (tmp_path / "vector.cpp").write_text(source)
        command = ["g++", "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", f"-march={march}"]
        subprocess.run([*command, tmp_path / "vector.cpp", "-o", tmp_path / "vector.so"], check=True)
        return ctypes.CDLL(str(tmp_path / "vector.so"))

    monkeypatch.setattr(torch_private, "has_amx", lambda: False)
    monkeypatch.setattr(torch_private, "cpp_library", compiled)
    nothing_compiled()
    for tokens in (1, 8, 16, 17, 63):
        for transposed in (False, True):
            operands = addmm_operands((131, 150), tokens, dtype, transposed, bias=True, rank=17)
            exact, eager, magnitude = (
                dense_addmm(*each, transposed, 16) for each in (wide(operands), operands, absolute(operands))
            )
            assert_close(vector_addmm(*operands, transposed, 16), exact, eager, magnitude)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for transposed in (False, True):
            operands = addmm_operands((19, 9), tokens, dtype, transposed, bias=True)
            torch.library.opcheck(vector_addmm, (*operands, transposed, 16))
        left, right = random(tokens, 19, dtype=dtype), random(tokens, 9, dtype=dtype)
        torch.library.opcheck(vector_dots, (left, right, random(19, 2, dtype=dtype), torch.tensor([5]), 16))


def test_values_may_have_another_dtype_than_what_is_multiplied() -> None:
    left, right, values = random(63, 33).bfloat16(), random(63, 65).bfloat16(), random(33, 7).float()
    found = vector_dots(left, right, values, torch.tensor([5]), 8)
    assert found.dtype == torch.float32
    assert torch.equal(found, vector_dots(left.float(), right.float(), values, torch.tensor([5]), 8))


def test_columns_are_kept_once_for_a_seed_and_are_small() -> None:
    *operands, seed, x, bias = addmm_operands((128, 64), 5, torch.float32, False)
    for _ in range(2):
        first = vector_addmm(*operands, seed, x, bias, False, 16)
        vector_dots(random(5, 128).float(), x, operands[2], seed, 16)
    assert kept_bytes() == 4 * operands[2].numel() // 16
    seed.fill_(6)
    found = vector_addmm(*operands, seed, x, bias, False, 16)
    assert torch.equal(found, vector_addmm(*operands, torch.tensor([6]), x, bias, False, 16))
    assert not torch.equal(found, first)
    assert kept_bytes() == 4 * operands[2].numel() // 16


def test_the_source_is_part_of_the_package() -> None:
    for name in ("vector.cpp", "vector_amx.cpp"):
        assert "transposed(" in importlib.resources.files("slcompile.kernels").joinpath(name).read_text()
