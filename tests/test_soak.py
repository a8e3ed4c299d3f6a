"""Short soaks: nothing grows from one model's life to the next, nor from step to step under FSDP2.

``python -m tests.soak`` and ``tests.soak_fsdp`` run them at length.
"""

from __future__ import annotations

import pytest

from slcompile import torch_private
from tests import soak, soak_fsdp
from tests.testing import torchrun

pytestmark = pytest.mark.slow


def test_nothing_grows(aten_kernels):
    with torch_private.unlimited_recompiles():
        first, last = soak.soak(2 * 12, print, numbers=(3, 7))
    assert not soak.grown(first, last)


def test_threads_train_models_of_their_own(aten_kernels):
    soak.in_threads(count=2, steps=3)


@pytest.mark.long
def test_nothing_grows_under_fsdp():
    printed = torchrun("-m", "tests.soak_fsdp", "--steps", 60, "--after", 6, "--lite")
    for rank in range(2):
        assert f"[{rank}] grew: nothing" in printed
        assert f"[{rank}] | factorized weights | 4 | 4 |" in printed


def test_growth_is_seen():
    first = {soak_fsdp.IN_USE: 0, "threads": 1}
    assert not soak_fsdp.grown(first, {soak_fsdp.IN_USE: 2 * 2**20, "threads": 1})
    assert len(soak_fsdp.grown(first, {soak_fsdp.IN_USE: 2 * 2**20 + 1, "threads": 2})) == 2
    first, last = {"open files": 3, "resident bytes": 1}, {"open files": 4, "resident bytes": 2}
    assert soak.grown(first, last) == ["open files: 3 -> 4"]
    assert soak.grown({"resident bytes": 0}, {"resident bytes": 2 * soak.BYTES})
