from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.kernels.harness import name_of


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the test module saves when it runs as a script, by name of the case, of the cases that are run.

    In a process of its own: triton reads TRITON_INTERPRET as it is imported.
    """
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    items = [each for each in request.session.items if each.path == request.path and hasattr(each, "callspec")]
    params = [each.callspec.params for each in items if "interpreted" in each.fixturenames]
    names = [name_of(each["case"]) for each in params if "case" in each]
    command = [sys.executable, str(request.path), str(path), *names]
    places = [str(request.config.rootpath), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run(command, env=environment, check=True)
    return torch.load(path)
