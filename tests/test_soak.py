"""A short soak: nothing grows from one model's life to the next; ``python -m tests.soak`` runs it at length."""

from __future__ import annotations

import pytest

from slcompile import torch_private
from tests import soak

pytestmark = pytest.mark.slow


def test_nothing_grows(aten_kernels):
    with torch_private.unlimited_recompiles():
        first, last = soak.soak(2 * 12, print, numbers=(3, 7))
    assert not soak.grown(first, last)


def test_threads_train_models_of_their_own(aten_kernels):
    soak.in_threads(count=2, steps=3)


def test_growth_is_seen():
    first, last = {"open files": 3, "resident bytes": 1}, {"open files": 4, "resident bytes": 2}
    assert soak.grown(first, last) == ["open files: 3 -> 4"]
    assert soak.grown({"resident bytes": 0}, {"resident bytes": 2 * soak.BYTES})
