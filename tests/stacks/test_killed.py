"""A process is killed, or does not come: training goes on from the last whole checkpoint, or ends with its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed
import pytest
from killed import STEP
from killed import example as distributed

pytestmark = pytest.mark.slow

SIZES = ["--width", 32, "--heads", 2, "--layers", 2, "--context", 16, "--batch", 4, "--log-every", 1]
STEPS, SAVE_EVERY = 6, 2


def run(point: str, folder: Path, processes: int, timeout: float = 60) -> tuple[int, str]:
    """Returns torchrun's exit status, and what was printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    rest = [*SIZES, "--steps", STEPS, "--save-every", SAVE_EVERY, "--timeout", timeout]
    command = [*launch, Path(killed.__file__), point, folder, *rest]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


def losses_of(folder: Path) -> dict[int, float]:
    return {int(step): loss for step, loss in json.loads((folder / "losses0.json").read_text()).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, printed = run("never", folder, processes=1)
    assert status == 0, printed
    return losses_of(folder)


@pytest.mark.parametrize(
    ("point", "processes", "whole", "again"),
    [
        pytest.param("conversion", 2, [], 4, marks=pytest.mark.long),
        pytest.param("step", 2, [4], 1, marks=pytest.mark.long),
        ("save", 2, [2], 1),
        pytest.param("move", 4, [2], 2, marks=pytest.mark.long),
        pytest.param("remove", 2, [2, 4], 1, marks=pytest.mark.long),
    ],
)
def test_it_goes_on_from_the_last_whole_checkpoint(point, processes, whole, again, tmp_path, undisturbed):
    status, printed = run(point, tmp_path, processes)
    assert status != 0
    assert "Signal 9 (SIGKILL)" in printed
    steps = [int(each.name.removeprefix("step-")) for each in distributed.checkpoints(tmp_path / "checkpoints")]
    assert steps == whole
    status, printed = run("never", tmp_path, again)
    assert status == 0, printed
    losses = losses_of(tmp_path)
    start = max(whole, default=0)
    assert list(losses) == list(range(start + 1, STEPS + 1))
    assert losses == pytest.approx({step: undisturbed[step] for step in losses}, rel=1e-9)
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == [f"step-{STEPS:08}"]


@pytest.mark.long
@pytest.mark.parametrize("point", ["hang", "hang at the start"])
def test_a_process_that_does_not_come_is_named(point, tmp_path):
    status, printed = run(point, tmp_path, processes=2, timeout=6)
    assert status != 0  # which it is not where the others wait for it
    assert "Ranks 1 failed to pass monitoredBarrier" in printed
    assert (f"step {STEP - 1}: loss" in printed) == (point == "hang")
