from __future__ import annotations

from typing import Any

import pytest
import torch

from slcompile.backend import RUN


@pytest.fixture
def light() -> dict[str, Any]:
    """Options with which our passes run and Inductor calls ATen instead of compiling C++, which takes most time."""
    inductor = {**torch._inductor.list_mode_options()["lite"], **dict.fromkeys(RUN, True)}
    return {"rank": 8, "density": 0.05, "seed": 3, "inductor": inductor}
