"""The kernels' table: every kernel has a line at each shape, with what the compiler and the formulas say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="the kernels need triton")

SCRIPT = Path(__file__).parents[2] / "examples" / "kernel_table.py"
KERNELS = {  # and whether they multiply matrices
    "add": False,
    "read": False,
    "project": True,
    "sum_splits": False,
    "linear_factored": True,
    "linear_factored, transposed": True,
    "sum_splits, transposed": False,
}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, check=False, env=environment
    )


def test_one_size_and_one_target() -> None:
    done = run("--sizes", "1B", "--targets", "sm_90")
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line[0] == "│"]
    rows = {(row[0], row[2]): row for row in cells}
    assert len(rows) == len(cells)
    assert set(rows) == {(kernel, shape) for kernel in KERNELS for shape in ("1B 2048x2048", "1B 5461x2048")}
    for (kernel, _), (_, target, _, registers, spilled, shared, matrix, moved, flops, micros) in rows.items():
        assert target == "sm_90"
        assert 0 < int(registers) <= 255
        assert int(spilled) == 0
        assert int(shared) <= 227 * 1024
        assert (matrix == "yes") == (float(flops) > 0) == KERNELS[kernel]
        # The larger of the two, to the digits that are printed.
        by_bytes, by_flops = float(moved) / 3.35, float(flops) / 989 * 1e3
        assert float(micros) == pytest.approx(max(by_bytes, by_flops), abs=0.02)
    # 2 * 16 * 512 * 2048 FLOPs; 61 values a row and a sector of 32 bytes of W for each, read and written.
    assert rows["project", "1B 2048x2048"][8] == "0.03"
    assert rows["add", "1B 2048x2048"][7] == f"{2048 * 61 * (2 + 2 * 32) / 1e6:.2f}"


@pytest.mark.parametrize(
    ("flag", "wrong", "nearest"),
    [("--targets", "sm_91", "sm_90"), pytest.param("--sizes", "7b", "7B", marks=pytest.mark.long)],
)
def test_unknown_names_are_refused(flag: str, wrong: str, nearest: str) -> None:
    done = run(flag, wrong)
    assert done.returncode == 2
    assert f"argument {flag}: must be any of" in done.stderr
    assert f"got '{wrong}'; the nearest is '{nearest}'" in done.stderr
    assert "Traceback" not in done.stderr
