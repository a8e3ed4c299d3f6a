"""Two processes of torchrun (gloo): DDP, FSDP2, distributed checkpoints, the start on the meta device, the example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

import slcompile
from tests.testing import on_processes, torchrun

pytestmark = pytest.mark.slow

RANKS = Path(ranks.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Where both processes wrote, and what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_processes(RANKS, folder, "ddp", "fsdp", "moving", "meta")


@pytest.fixture(scope="module")
def alone() -> tuple[torch.nn.Module, torch.optim.Optimizer, list[float]]:
    """The same model trained by one process, compiled as a whole."""
    torch.manual_seed(0)
    model = slcompile.factorize_(ranks.transformer(), slcompile.SLConfig(rank=8, density=0.05, seed=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, backend="sltrain", options=ranks.LIGHT)
    return model, optimizer, ranks.train(compiled, optimizer, range(ranks.STEPS))


def test_ddp_trains_as_one_process_does(found, alone):
    model, _, losses = alone
    folder, results = found
    first, second = results["ddp"]
    assert first == second
    assert first["graphs"] > 1  # Dynamo splits at DDP's buckets
    assert first["losses"] == pytest.approx(losses, rel=1e-9)
    saved = torch.load(folder / "ddp.pt")  # by the process whose own start was replaced
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-7, atol=1e-9)


def test_fsdp2_trains_as_one_process_does_and_one_process_reads_its_checkpoint(found, alone):
    model, _, losses = alone
    folder, results = found
    first, second = results["fsdp"]
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-9)
    assert first["graphs"] == 1  # both layers run the graph of the first
    # B [256, 8], A [8, 64] and values [256, 3]: half of the rows each
    assert first["shards"] == {"B": [[256, 8], [128, 8]], "A": [[8, 64], [4, 64]], "values": [[256, 3], [128, 3]]}

    by_norms = ranks.by_norms()  # of whole factors and gradients
    assert first["by norms"]["losses"] == pytest.approx(by_norms["losses"], rel=1e-9)
    assert first["by norms"]["limited"] == by_norms["limited"] > 0
    assert first["by norms"]["chosen"] == second["by norms"]["chosen"] == by_norms["chosen"]

    torch.manual_seed(1)
    restored = slcompile.factorize_(ranks.transformer(), slcompile.SLConfig(rank=8, density=0.05))
    optimizer = torch.optim.AdamW(restored.parameters(), lr=3e-3)
    assert ranks.example.load(restored, optimizer, folder / "checkpoint") == ranks.STEPS
    for name, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=1e-7, atol=1e-9)
    assert slcompile.factors(restored)["layers.0.up.weight"].seed == slcompile.factors(model)["layers.0.up.weight"].seed
    more = range(ranks.STEPS, ranks.STEPS + 2)
    assert ranks.train(restored, optimizer, more) == pytest.approx(ranks.train(model, alone[1], more), rel=1e-9)


@pytest.mark.long
def test_a_frozen_base_trains_under_ddp_and_sharded_as_in_one_process(tmp_path):
    torch.manual_seed(0)
    config = slcompile.SLConfig(rank=4, density={"*up*": 0.05, "*": 0}, base="frozen", seed=0)
    model = slcompile.factorize_(ranks.transformer().requires_grad_(False), config)
    trained = [each for each in model.parameters() if each.requires_grad]
    losses = ranks.train(model, torch.optim.AdamW(trained, lr=3e-3), range(ranks.STEPS))
    first, second = on_processes(RANKS, tmp_path, "frozen")["frozen"]
    for found in (first["ddp"], first["fsdp"], second["ddp"], second["fsdp"]):
        assert found["losses"] == pytest.approx(losses, rel=1e-9)
        assert found["trained"] == len(trained)
        assert found["is_kept"]


@pytest.mark.long
def test_a_packed_base_trains_sharded_as_in_one_process_which_reads_its_checkpoint_and_merges_it(tmp_path):
    first, second = on_processes(RANKS, tmp_path, "packed")["packed"]
    for base, columns in {"int8": 68, "nf4": 36}.items():  # a scale of 4 bytes for each 64 numbers
        config = ranks.PACKED[base]
        torch.manual_seed(0)
        model, restored = (slcompile.factorize_(ranks.transformer().requires_grad_(False), config) for _ in range(2))
        trained = ([each for each in one.parameters() if each.requires_grad] for one in (model, restored))
        optimizers = [torch.optim.AdamW(each, lr=3e-3) for each in trained]
        losses = ranks.train(model, optimizers[0], range(ranks.STEPS))
        for found in (first, second):
            assert [found[f"{base} {kind}"] for kind in ("ddp", "whole")] == 2 * [pytest.approx(losses, rel=1e-9)]
            assert found[f"{base} mixed"] == pytest.approx(losses, rel=1e-5)
            assert found[base] == {"dtype": "torch.uint8", "shard": [128, columns]}
        assert ranks.example.load(restored, optimizers[1], tmp_path / base) == ranks.STEPS
        assert restored.layers[0].up.weight_sl.base_kind == base
        for name, value in slcompile.merged_state_dict(model).items():
            torch.testing.assert_close(slcompile.merged_state_dict(restored)[name], value, rtol=1e-7, atol=1e-9)


def test_non_zeros_move_alike_under_ddp_and_not_without_or_sharded(found):
    first, second = found[1]["moving"]
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0]
    assert (first["own"], first["apart"], second["apart"]) == (1, 0, 0)  # the first process's moves
    assert second["own"] < 1
    for said in (first["said"], second["said"]):
        assert "model is inside no wrapper, on several processes: moves have to be the same" in said[0]
        assert "weight_sl.values is a DTensor: a shard of the values" in said[1]


def test_nothing_dense_is_allocated_from_the_meta_device_to_the_shards(found):
    first, second = found[1]["meta"]
    for process in (first, second):
        assert process["devices"] == ["cpu"]
        assert not set(process["dense"]) & set(process["allocated"])
        assert max(process["allocated"]) < max(process["dense"])
    assert first["seeds"] == second["seeds"]
    assert len(set(first["seeds"])) == 8
    assert first["drawn"] != second["drawn"]  # each process draws its own rows
    assert all(0.01 < std < 2 for std in first["drawn"])


@pytest.mark.long
def test_the_example_trains_resumes_on_one_process_and_writes_a_dense_model(tmp_path):
    script = RANKS.parents[2] / "examples" / "pretrain_distributed.py"
    small = ["--width", 64, "--layers", 2, "--context", 32, "--out", tmp_path]
    printed = torchrun(script, *small, "--steps", 20)
    assert "135,168 parameters when dense, " in printed
    first, last = (float(each) for each in re.findall(r"step \d+: loss (.*)", printed))
    assert last < first < 5.5
    printed = torchrun(script, *small, "--steps", 30, processes=1)
    ((step, loss),) = re.findall(r"step (\d+): loss (.*)", printed)
    assert step == "30"
    assert float(loss) < first
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = ranks.example.Transformer(width=64, heads=4, layers=2, context=32)
    model.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"), assign=True)
    assert not any(each.is_meta for each in model.parameters())
