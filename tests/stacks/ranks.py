"""What torchrun starts on each process: ``ranks.py FOLDER NAME...`` runs functions below, writes what they return."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import slcompile
from slcompile.backend import sltrain
from slcompile.captured import REQUIRED_SETTINGS
from slcompile.convert.ledger import ledger
from slcompile.optim import SupportMoves

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain_distributed as example

STEPS = 3
CONFIG = slcompile.SLConfig(rank=8, density=0.05)  # no seed: processes agree without one
LIGHT = {"inductor": {**torch._inductor.list_mode_options()["lite"], **dict.fromkeys(REQUIRED_SETTINGS, True)}}
"""Options with which our passes run and Inductor calls ATen instead of compiling C++, which takes most time."""


def transformer(layers: int = 2) -> nn.Module:
    """Of double precision, in which two ways of adding up the same gradients agree to many digits."""
    return example.Transformer(width=64, heads=2, layers=layers, context=16).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], world: int = 1, rank: int = 0):
    """Trains on a process's share of 8 sequences a step; returns the losses of all."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(256, (8, 17), generator=generator).chunk(world)[rank]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach(), world))
    return losses


def mean(value: Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


def ddp(folder: Path) -> dict[str, Any]:
    """Factorized, wrapped, compiled; each process starts from other random numbers, which DDP replaces."""
    torch.manual_seed(dist.get_rank())
    model = slcompile.factorize_(transformer(), CONFIG)
    # Small buckets: Dynamo splits the graph where one ends, and calls the backend for each part.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 100_000
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.1)
    parts = []

    def counted(gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        parts.append(gm)
        return sltrain(gm, example_inputs, **kwargs)

    compiled = torch.compile(wrapped, backend=counted, options=LIGHT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = train(compiled, optimizer, range(STEPS), dist.get_world_size(), dist.get_rank())
    if dist.get_rank() == 1:
        torch.save(model.state_dict(), folder / "ddp.pt")
    return {"losses": losses, "graphs": len(parts)}


def fsdp(folder: Path) -> dict[str, Any]:
    """Factorized, compiled layer by layer, sharded; then the sharded checkpoint."""
    torch.manual_seed(0)
    model = slcompile.factorize_(transformer(), CONFIG)
    for layer in model.layers:
        layer.compile(backend="sltrain", fullgraph=True, options=LIGHT)
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = train(model, optimizer, range(STEPS), dist.get_world_size(), dist.get_rank())
    example.save(model, optimizer, folder / "checkpoint", STEPS)
    weight = model.layers[0].up.weight_sl
    shards = {name: (list(each.shape), list(each.to_local().shape)) for name, each in weight.named_parameters()}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    by_norm = by_norms(dist.get_world_size(), dist.get_rank())
    return {"losses": losses, "graphs": graphs, "shards": shards, "by norms": by_norm}


def by_norms(world: int = 1, rank: int = 0) -> dict[str, Any]:
    """Steps of which a limit holds some back, then those of chosen blocks; sharded among several processes."""
    torch.manual_seed(0)
    model = slcompile.factorize_(transformer(layers=1), replace(CONFIG, seed=0))
    if world > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    limit = slcompile.limit_steps(model, optimizer)
    losses = train(model, optimizer, range(STEPS), world, rank)
    limit.remove()
    blocks = slcompile.optim.BlockAdamW(model.parameters(), lr=1e-3, share=0.2, update_every=1)
    losses += train(model, blocks, range(STEPS), world, rank)
    return {"losses": losses, "limited": limit.limited, "chosen": [group["chosen"] for group in blocks.param_groups]}


def frozen(folder: Path) -> dict[str, Any]:
    """What is added to a frozen base, under DDP and sharded by FSDP2; the base stays what it was."""
    config = slcompile.SLConfig(rank=4, density={"*up*": 0.05, "*": 0}, base="frozen", seed=0)
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for name in ("ddp", "fsdp"):
        torch.manual_seed(0)
        model = slcompile.factorize_(transformer().requires_grad_(False), config)
        before = model.layers[0].up.weight_sl.base.clone()
        if name == "ddp":
            run: Any = nn.parallel.DistributedDataParallel(model)
        else:
            run = model
            for layer in model.layers:
                layer.compile(backend="sltrain", fullgraph=True, options=LIGHT)
                fully_shard(layer)
            fully_shard(model)
        trained = [each for each in model.parameters() if each.requires_grad]
        losses = train(run, torch.optim.AdamW(trained, lr=3e-3), range(STEPS), world, rank)
        base = model.layers[0].up.weight_sl.base
        base = base.full_tensor() if name == "fsdp" else base
        found[name] = {"losses": losses, "trained": len(trained), "is_kept": torch.equal(base, before)}
    return found


PACKED = {
    base: slcompile.SLConfig(rank=4, density={"*up*": 0.05, "*": 0}, base=base, seed=0) for base in ("int8", "nf4")
}


def packed(folder: Path) -> dict[str, Any]:
    """What is added to a frozen base of 8 or 4 bits, sharded; checkpoints of it, and training in mixed precision."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for base, config in PACKED.items():
        for kind in ("ddp", "whole", "mixed"):
            torch.manual_seed(0)
            model = slcompile.factorize_(transformer().requires_grad_(False), config)
            run: nn.Module = model
            if kind == "ddp":
                run = nn.parallel.DistributedDataParallel(model)
            else:
                policy = MixedPrecisionPolicy(*([] if kind == "whole" else [torch.float32]))
                for layer in model.layers:
                    layer.compile(backend="sltrain", fullgraph=True, options=LIGHT)
                    fully_shard(layer, mp_policy=policy)
                fully_shard(model, mp_policy=policy)
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
            found[f"{base} {kind}"] = train(run, optimizer, range(STEPS), world, rank)
            if kind == "whole":
                example.save(model, optimizer, folder / base, STEPS)
                held = model.layers[0].up.weight_sl.base
                assert isinstance(held, DTensor)
                found[base] = {"dtype": str(held.dtype), "shard": list(held.to_local().shape)}
    return found


def moving(folder: Path) -> dict[str, Any]:
    """Non-zeros move under DDP, where each process has a loss of its own; what is said without it and under FSDP2."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    config = slcompile.SLConfig(rank=8, density=0.05, support="largest", init="spectral")
    model = slcompile.factorize_(transformer(), config)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    moves = SupportMoves(wrapped, optimizer, every=1, fraction=0.2)
    weights = moves._require_movable()
    ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(rank))

    def loss() -> Tensor:
        return F.cross_entropy(wrapped(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    losses, agreements = [], []
    for _ in range(STEPS):
        step_loss = loss()
        step_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(step_loss.detach(), world))
        own = moves._look(weights, [wrapped], loss, 0.2)
        assert moves.step(loss) == sum(len(each.which) for each in own.values())  # of both as many as may
        for name, each in own.items():
            agreements.append(torch.equal(weights[name].offsets[each.which].long(), each.offsets))
    apart = 0.0
    for each in (*model.state_dict().values(), *(state["exp_avg"] for state in optimizer.state.values())):
        other = each.detach().clone()
        dist.broadcast(other, 0)
        apart = max(apart, float((each - other).abs().max()))

    def said(other: nn.Module) -> str:
        with pytest.raises(ValueError, match="Use DistributedDataParallel") as error:
            SupportMoves(other, torch.optim.SGD(other.parameters()), every=1).step(lambda: torch.tensor(0.0))
        return str(error.value)

    bare, sharded = (slcompile.factorize_(transformer(), config) for _ in range(2))
    return {
        "losses": losses,
        "own": sum(agreements) / len(agreements),
        "apart": apart,
        "said": [said(bare), said(fully_shard(sharded))],
    }


def meta(folder: Path) -> dict[str, Any]:
    """The example's start from the meta device, and every allocation on the way."""
    with torch.device("meta"):  # no embedding has as many bytes as a weight of a layer
        model = example.Transformer(width=96, heads=2, layers=2, context=16).double()
    dense = {each.nbytes for name, each in model.named_parameters() if "layers." in name and each.dim() == 2}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        example.sharded(model, CONFIG, torch.device("cpu"), seed=0)
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    weight = model.layers[0].up.weight_sl
    drawn = [each.to_local().double().std().item() for each in (weight.A, weight.values, model.embed.weight)]
    return {
        "dense": sorted(dense),
        "allocated": sorted({each.nbytes() for each in events if each.nbytes() > 0}),
        "seeds": [module.seed.item() for module in model.modules() if isinstance(module, slcompile.SLWeight)],
        "drawn": drawn,
        "devices": sorted({each.device.type for each in [*model.parameters(), *model.buffers()]}),
    }


def main(functions: dict[str, Any]) -> None:
    """Runs some functions, named on the command line after the folder, in one process group, one after the other."""
    dist.init_process_group("gloo")
    folder, *names = sys.argv[1:]
    for name in names:
        result = functions[name](Path(folder))
        Path(folder, f"{name}{dist.get_rank()}.json").write_text(json.dumps(result))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ledger.reset()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(globals())
