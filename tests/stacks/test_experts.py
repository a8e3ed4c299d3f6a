"""Experts divided among two and four processes (gloo), also in two dimensions, beside one process."""

from __future__ import annotations

from pathlib import Path

import experts
import pytest

from tests.testing import on_processes

pytestmark = pytest.mark.slow

SCRIPT = Path(experts.__file__)


def on(processes: int, folder: Path, function: str = "experts") -> dict:
    """What the first process found, which is what all of them did of losses, gradients and errors."""
    results = on_processes(SCRIPT, folder, function, processes=processes)[function]
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return on(2, tmp_path_factory.mktemp("experts"))


def assert_as_one_process(result: dict) -> None:
    assert result["losses"] < 1e-9
    assert result["gradients"] < 1e-9 < 1e-4 < result["smallest"]  # every parameter learns
    assert result["state"] < 1e-9  # after three steps
    # Support and all: what a BLAS rounds otherwise for half of the rows is far below an entry at another place.
    assert max(result["composed"].values(), default=0.0) < 1e-14


@pytest.mark.parametrize("name", ["mixtral grouped_mm", "gpt_oss batched_mm"])
def test_two_processes_train_as_one(found, name):
    assert_as_one_process(found[name])
    assert len(found[name]["composed"]) == 4 + 2


def test_copies_are_divided_too(found):
    assert found["copy"] < 1e-12


def test_half_of_the_experts_are_here(found):
    assert found["gpt_oss batched_mm"]["local"] == {
        "gate_up_proj_bias": [2, 72],
        "down_proj_bias": [2, 64],
        "gate_up_proj_sl.B": [2, 64, 8],
        "gate_up_proj_sl.A": [2, 8, 72],
        "gate_up_proj_sl.values": [2, 64, 4],
        "down_proj_sl.B": [2, 36, 8],
        "down_proj_sl.A": [2, 8, 64],
        "down_proj_sl.values": [2, 36, 4],
    }


@pytest.mark.long
def test_two_dimensions_train_as_one_process(tmp_path):
    result = on(4, tmp_path)["two dimensions"]
    assert_as_one_process(result)
    assert all(shape[0] == 1 for shape in result["local"].values())


@pytest.mark.long
@pytest.mark.parametrize(("processes", "count"), [(2, 7), (4, 2)])
def test_each_way_of_multiplying_trains_as_one_process(tmp_path, processes, count):
    results = on(processes, tmp_path, "more")
    assert len(results) == count
    for result in results.values():
        assert_as_one_process(result)


def test_what_cannot_be_divided_is_refused(found):
    messages = [
        "model.layers.0.mlp.experts: num_experts=3 must be a multiple of 2 processes",
        "experts.down_proj: a weight of shape (4, 64, 36) with support='uniform' cannot be shared",
        "plan['*.mlp'] fits no module with stacks of experts of the model",
        "experts is shared or sharded already: call parallelize once, before fully_shard",
        "0 is called with x: experts must be called with tokens",
        "0 has num_experts=None and up of shape (4, 32, 32): all that it holds must be of num_experts experts",
        "0 has parameters in submodules, which would be of all experts",
        "plan['*.experts'] got 'experts', did you mean 'expert'",
        "a weight with a frozen base or without a sparse part cannot be shared",
    ]
    assert len(found["refused"]) == len(messages)
    for said, message in zip(found["refused"], messages, strict=True):
        assert message in said
