"""The kernels' support has the integers of ``ops.support``: in Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slcompile.ops.support import SEED_LIMIT, stratified_columns
from tests.kernels.harness import TARGETS

triton = pytest.importorskip("triton", reason="the kernels need triton")

# rows, columns, groups, first_row, vector: sizes that divide nothing, blocks that are not full, and each 64-bit step.
SHAPES = {
    "one_element": (1, 1, 1, 0, 1),
    "one_group": (9, 17, 1, 0, 1),
    "odd": (7, 63, 5, 3, 1),
    "every_column": (5, 31, 31, 0, 1),
    "many_blocks": (33, 1001, 30, 0, 1),
    "row_beyond_2**31": (3, 257, 9, 2**31 + 5, 1),
    "counter_wraps_at_2**32": (4, 257, 9, 2**32 // 9 - 2, 1),
    "row_beyond_2**40": (3, 127, 11, 2**40 + 1, 1),
    "group_times_columns_beyond_2**31": (2, 2**31 - 1, 301, 0, 1),
    "no_rows": (0, 5, 2, 0, 1),
    "blocks": (37, 63, 5, 0, 16),
    "blocks_cut": (35, 63, 5, 13, 8),
    "blocks_beyond_2**40": (130, 127, 11, 2**40 + 1, 64),
}
SEEDS = (0, 1, SEED_LIMIT - 1)
CASES = [(seed, *shape) for shape in SHAPES.values() for seed in SEEDS]

INTERPRETED = """
import sys
import torch
from tests.kernels.columns import stratified_columns
torch.save([stratified_columns(torch.tensor([seed]), rows, columns, groups, first_row=first_row, vector=vector)
            for seed, rows, columns, groups, first_row, vector in eval(sys.argv[1])], sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """What the kernel returns for CASES, from a process of its own: triton reads TRITON_INTERPRET as it is imported."""
    path = tmp_path_factory.mktemp("interpreted") / "columns.pt"
    places = [str(request.config.rootpath), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-c", INTERPRETED, repr(CASES), str(path)], env=environment, check=True)
    return torch.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_kernel_equals_torch_bit_for_bit(interpreted: list[Tensor], shape: str, seed: int) -> None:
    rows, columns, groups, first_row, vector = SHAPES[shape]
    found = interpreted[CASES.index((seed, *SHAPES[shape]))]
    assert found.dtype == torch.int64
    assert found.shape == (rows, groups)
    assert torch.equal(
        found, stratified_columns(torch.tensor([seed]), rows, columns, groups, first_row=first_row, vector=vector)
    )


@pytest.mark.long
def test_the_package_is_imported_without_triton() -> None:
    blocked = "import sys; sys.modules['triton'] = None; import slcompile, slcompile.kernels, slcompile.ops.support"
    subprocess.run([sys.executable, "-c", blocked], check=True)


# What the launcher's integers become: all wide, and those equal to 1 turned into constants.
SIGNATURES = {
    "wide": ({"first_row": "i64", "size": "i64", "columns": "i32", "groups": "i32"}, {}),
    "ones": ({"first_row": "constexpr", "size": "i32", "columns": "constexpr", "groups": "constexpr"},
             {"first_row": 1, "columns": 1, "groups": 1}),
}  # fmt: skip


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh cache, so that the test compiles."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("compiler")
def test_compiles_without_spills(target: str, signature: str) -> None:
    from slcompile.kernels.offline import compile_for, resources
    from tests.kernels.columns import BLOCK, stratified_columns_kernel

    types, constants = SIGNATURES[signature]
    types = {"p_seed": "*i64", "p_columns": "*i64", **types, "VECTOR": "constexpr", "BLOCK": "constexpr"}
    compiled = compile_for(stratified_columns_kernel, types, {**constants, "VECTOR": 16, "BLOCK": BLOCK}, target)
    if not target.startswith("gfx"):
        assert f".target {target}" in compiled.asm["ptx"]
    usage = resources(compiled)
    assert usage.spilled == 0
    # 64 registers a thread keep 32 warps on a multiprocessor, half of what it holds.
    assert 0 < usage.registers <= 64
    assert not usage.has_mma


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_on_cuda_equals_torch_on_cpu_bit_for_bit(shape: str, seed: int) -> None:
    from tests.kernels.columns import stratified_columns as launched

    rows, columns, groups, first_row, vector = SHAPES[shape]
    found = launched(torch.tensor([seed], device="cuda"), rows, columns, groups, first_row=first_row, vector=vector)
    expected = stratified_columns(torch.tensor([seed]), rows, columns, groups, first_row=first_row, vector=vector)
    assert torch.equal(found.cpu(), expected)
