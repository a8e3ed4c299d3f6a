"""Tensor parallelism: two processes, and two dimensions of two each (gloo), beside one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared

from tests.testing import on_processes

pytestmark = pytest.mark.slow

SCRIPT = Path(shared.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("shared")
    first, second = on_processes(SCRIPT, folder, "shared")["shared"]
    for name in ("refused", "again"):
        assert first[name] == second[name]
    return first


def assert_as_one_process(result: dict) -> None:
    assert result["losses"] < 1e-9
    assert result["gradients"] < 1e-9
    assert result["state"] < 1e-9  # after three steps
    # Support and all: what a BLAS rounds otherwise for half of the rows is far below an entry at another place.
    assert max(result["composed"].values(), default=0.0) < 1e-14


@pytest.mark.parametrize("kind", ["stratified", "vector", "dense", "compiled"])
def test_two_processes_train_as_one(found, kind):
    assert_as_one_process(found[kind])
    assert len(found[kind]["composed"]) == (0 if kind == "dense" else 2)


def test_half_of_the_rows_are_here(found):
    # The bias, B and values by rows; A is whole.
    assert found["stratified"]["local"] == [[32], [32, 8], [8, 64], [32, 4]]


@pytest.mark.long
def test_two_dimensions_train_as_one_process(tmp_path):
    for found in on_processes(SCRIPT, tmp_path, "shared", processes=4)["shared"]:
        result = found["two dimensions"]
        assert_as_one_process(result)
        assert result["local"] == [[16], [16, 8], [4, 64], [16, 4]]


def test_whole_factors_stay_equal_and_a_loaded_seed_moves_the_support(found):
    assert found["again"] == {"apart": 0.0, "loaded": 0.0}


def test_what_cannot_be_shared_is_refused(found):
    messages = [
        "puts 3 non-zeros in each row of 64 columns, which 2 processes cannot share by columns; the nearest that they",
        "with support='uniform' cannot be shared: only those of nn.Linear and of experts can",
        "plan['*.q_proj'] got 'columns', did you mean 'column'",
        "plan['*.query'] fits no linear layer of the model",
        "mesh must be a DeviceMesh of one dimension, got",
        "size 63 must be a multiple of 2 processes",
        "is shared or sharded already: call parallelize once, before fully_shard",
        "is on the meta device: give it memory and numbers before it is shared",
    ]
    assert len(found["refused"]) == len(messages)
    for said, message in zip(found["refused"], messages, strict=True):
        assert message in said
