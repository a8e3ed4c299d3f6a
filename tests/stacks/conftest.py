from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks.py is a script, too

import ranks


@pytest.fixture
def light() -> dict[str, Any]:
    """Options of a small model, compiled fast."""
    return {"rank": 8, "density": 0.05, "seed": 3, **ranks.LIGHT}
