"""Per-layer updates on two processes (gloo): the numbers of plain ones, under DDP and FSDP2, and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
import updates
from torch.distributed.checkpoint.api import CheckpointException

from slcompile.optim import per_layer
from tests.testing import on_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What both processes found, in one process group; and where their checkpoints are."""
    folder = tmp_path_factory.mktemp("updates")
    first, second = on_processes(Path(updates.__file__), folder, "updates")["updates"]
    for name in ("orders", "clipped"):
        assert first[name].keys() == second[name].keys()
    for name, result in second["equal"].items():  # each process has shards of its own
        first["equal"][f"{name}, second process"] = result
    return folder, first


def test_parameters_are_those_of_plain_updates_to_the_bit(found):
    results = found[1]["equal"]
    assert len(results) == 2 * 3 * 3
    for name, result in results.items():
        assert result == {"difference": 0.0, "gone": True, "all moved": True}, name


def test_optimizer_and_ddp_come_in_any_order_and_may_be_several(found):
    orders = found[1]["orders"]
    assert orders["late"] == orders["two optimizers"] == orders["one per layer, one plain"] == 0.0
    assert orders["gone"]


def test_what_cannot_be_waited_for_is_refused(found):
    orders = found[1]["orders"]
    assert "ValueError: PerLayerSGD was made before DistributedDataParallel, of some" in orders["partial and early"]
    assert "which has fp16_compress_hook already and takes one" in orders["hooked"]
    assert "need DistributedDataParallel(find_unused_parameters=False)" in orders["unused"]
    assert "RuntimeError: PerLayerSGD.step() found the gradient" in orders["never averaged"]


def test_a_shard_is_clipped_by_the_norm_of_the_whole_gradient(found):
    clipped = found[1]["clipped"]
    assert clipped["difference"] == 0.0
    assert 0 < clipped["clips"] < clipped["parameters"]


def test_gradients_of_one_layer_are_there_at_once(found):
    (plain, everything), (ours, _) = found[1]["most_gradients"].values()
    assert plain == everything
    assert ours < 0.35 * everything  # two layers, and what is outside of them


def test_sharded_states_are_saved_and_go_on(found):
    folder, results = found
    for name, kinds in {"float": ["Tensor"], "8-bit": ["OptimState8bit", "Tensor"]}.items():
        same = {"difference to plain": 0.0, "difference to restored": 0.0}
        assert results["checkpoints"][name] == {"step": updates.STEPS, "kinds": kinds, **same}
    assert (folder / "float" / f"step-{updates.STEPS:08}" / ".metadata").is_file()


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles an update for each shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(("name", "kind"), [("AdamW8bit", "OptimState8bit"), ("AdamW4bit", "OptimState4bit")])
def test_one_process_reads_the_low_bit_states_of_two(found, name, kind, eager):
    folder, results = found
    place = folder / name
    model = updates.low_bit_model(seed=1)
    optimizer = per_layer(updates.low_bit_class(name), model.parameters(), lr=3e-3)
    assert ranks.example.load(model, optimizer, place) == updates.STEPS
    kinds, numbers = zip(*updates.moments(optimizer), strict=True)
    kinds_of_two, written = results["low_bit"][place.name], torch.load(place / "moments0.pt")
    assert kinds.count(kind) >= kinds_of_two.count(kind) >= 12  # most of B, A and values of four weights
    for own, other, here, there in zip(kinds, kinds_of_two, numbers, written, strict=True):
        largest = float(there.abs().max())
        assert largest > 0
        # What two processes kept in full precision, being small, is quantized where it is whole.
        torch.testing.assert_close(here, there, rtol=0, atol=0 if own == other else 0.2 * largest)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_states_whose_blocks_would_be_cut_are_refused_before_anything_is_overwritten(found, name, eager):
    width, groups = updates.CUT[name]
    model = updates.low_bit_model(width, groups, seed=1)
    optimizer = per_layer(updates.low_bit_class(name), model.parameters(), lr=3e-3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointException) as refused:
        ranks.example.load(model, optimizer, found[0] / f"{name} cut")
    (error,) = [each[0] for each in refused.value.failures.values()]
    assert isinstance(error, ValueError)
    assert f"exp_avg: the shard {(3 * width, groups)} that is wanted here is quantized in blocks of " in str(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_process_reads_the_states_of_two(found):
    model = updates.model_of(128).float()
    optimizer = per_layer(torch.optim.AdamW, model.parameters(), lr=3e-3)
    assert ranks.example.load(model, optimizer, found[0] / "float") == updates.STEPS
    described = dcp.FileSystemReader(*ranks.example.checkpoints(found[0] / "float")).read_metadata().state_dict_metadata
    moments = {key: value for key, value in described.items() if key.endswith(".exp_avg")}
    assert len(moments) == len(list(model.parameters()))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == updates.STEPS
        assert float(state["exp_avg"].abs().max()) > 0
