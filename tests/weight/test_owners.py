"""Who owns a parameter, asked while other threads build models."""

from __future__ import annotations

import sys
import threading

import pytest
from torch import nn

from slcompile.weight.owners import LiveObjects


@pytest.fixture
def hasty_threads():
    """Threads take turns far more often, so that a race is met and not waited for."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", ["modules", "parameters"])
def test_it_is_found_while_another_thread_builds_a_model(kind, hasty_threads):
    layer, growing, is_done = nn.Linear(2, 2), nn.Module(), threading.Event()
    held = growing._modules if kind == "modules" else growing._parameters
    one = nn.Identity() if kind == "modules" else nn.Linear(2, 2).weight
    held.update((str(number), one) for number in range(200_000))

    def build() -> None:
        number = len(held)
        while not is_done.is_set():
            held[str(number)] = one
            number += 1

    thread = threading.Thread(target=build)
    thread.start()
    try:
        owners = LiveObjects.find().owners([layer.weight])
    finally:
        is_done.set()
        thread.join()
    assert owners[id(layer.weight)] == [(layer, "weight")]
