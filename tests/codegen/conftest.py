from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests of generated code run when they are asked for: ``pytest -m slow tests/codegen``."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.path.parent.name == "codegen" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: -m slow runs it"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What torch remembers of the GPU that was not there is forgotten."""
    yield
    torch._dynamo.reset()
