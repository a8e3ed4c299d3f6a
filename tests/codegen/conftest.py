from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What torch remembers of the GPU that was not there is forgotten."""
    yield
    torch._dynamo.reset()
