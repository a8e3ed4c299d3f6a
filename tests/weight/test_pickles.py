"""Pickles of models made when ``slcompile.weight`` was one file: what they name there is still to be imported."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import slcompile
import slcompile.weight
from slcompile.weight.placing import _remake
from slcompile.weight.sl_weight import SLWeight

OLD = {"_remake": "slcompile.weight.placing", "SLWeight": "slcompile.weight.sl_weight"}
"""What is pickled by reference, and the module that holds it now; before, all was in ``slcompile.weight``."""


def old_pickle(model: nn.Module) -> bytes:
    """Pickles a model with references as they were: into the module ``slcompile.weight``."""
    pickled = pickle.dumps(model, protocol=2)  # whose references are text, module and name
    for name, module in OLD.items():
        reference = f"c{module}\n{name}\n".encode()
        assert reference in pickled
        pickled = pickled.replace(reference, f"cslcompile.weight\n{name}\n".encode())
    return pickled


def references(pickled: bytes) -> set[str]:
    return {str(argument) for operation, argument, _ in pickletools.genops(pickled) if operation.name == "GLOBAL"}


def test_both_names_are_importable_from_where_they_were():
    assert slcompile.weight.SLWeight is SLWeight is slcompile.SLWeight
    assert slcompile.weight._remake is _remake


@pytest.mark.slow
def test_a_pickle_that_names_them_there_loads(tmp_path):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), slcompile.SLConfig(rank=8))
    pickled = old_pickle(model)
    assert {"slcompile.weight SLWeight", "slcompile.weight _remake"} <= references(pickled)
    assert not [each for each in references(pickled) if each.startswith("slcompile.weight.")]
    loaded: Any = pickle.loads(pickled)
    x = torch.randn(4, 64)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[0]) is type(model[0])
    assert type(loaded[0].weight_sl) is SLWeight
    # In a process that imported nothing of slcompile before, too.
    (tmp_path / "model.pickle").write_bytes(pickled)
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "expected.pt")
    script = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1] + "/model.pickle", "rb"))
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(expected["x"]), expected["y"])
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_todays_pickles_load_too():
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 96)), slcompile.SLConfig(rank=8))
    x = torch.randn(4, 64)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert torch.equal(pickle.loads(pickle.dumps(model, protocol))(x), model(x))
