"""What torchrun starts for ``test_reshaped.py``: checkpoints of a trained model by each layout, read by each other.

``reshaped.py write FOLDER`` writes one for each layout of so many processes, and beside it what it holds, whole;
``reshaped.py read FOLDER`` reads all that are there in each layout, and says what is not equal to the bit;
``reshaped.py read_and_write FOLDER`` does both.
"""

from __future__ import annotations

from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import slcompile
from slcompile.factorize import named_weights

LAYOUTS = {1: {"one": (1, 1)}, 2: {"fsdp": (2, 1), "tp": (1, 2)}, 4: {"fsdp": (4, 1), "both": (2, 2), "tp": (1, 4)}}
"""Processes -> name -> processes with data of their own, and those that share each matmul and divide the experts."""

PLAN = {"*.up": "column", "*.down": "row", "*.experts": "expert"}
STEPS = 2


class Experts(nn.Module):
    """32 -> 34 -> 32, four times: some of the blocks of four rows that share their columns are of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.inner, self.outer = nn.Parameter(torch.randn(4, 34, 32) / 6), nn.Parameter(torch.randn(4, 32, 34) / 6)
        self.bias = nn.Parameter(torch.randn(4, 32))

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        expert = chosen.flatten()
        each = tokens.repeat_interleave(chosen.shape[1], 0).unsqueeze(-1)
        hidden = torch.tanh(torch.bmm(self.inner[expert], each))
        output = torch.bmm(self.outer[expert], hidden).squeeze(-1) + self.bias[expert]
        return (output.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


class Block(nn.Module):
    """32 -> 48 -> 32 and experts; the attention of a transformer would add nothing but names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.router, self.experts = nn.Linear(32, 4), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        return x + self.experts(tokens, chosen, weights).view(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(32, 30)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def spread(data: int, tp: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model in a layout; four processes cannot divide its ranks, nor two dimensions its embedding's rows."""
    torch.manual_seed(seed)
    config = slcompile.SLConfig(rank=6, density=0.25, support="vector", vector=4, seed=seed)
    model = slcompile.factorize_(Net(), config, example_args=(torch.zeros(4, 8, dtype=torch.int64),))
    if data * tp > 1:
        mesh = init_device_mesh("cpu", (data, tp), mesh_dim_names=("data", "tp"))
        if tp > 1:
            slcompile.parallelize(model, mesh["tp"], PLAN)
        if data > 1:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole, and the composed weights, which show where their values lie."""
    options = StateDictOptions(full_state_dict=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    found = dict(weights)
    for name, state in states["state"].items():
        found |= {f"{name}, {key}": value for key, value in state.items()}
    for index, layer in enumerate(model.layers):
        if isinstance(layer, FSDPModule):
            layer.unshard()
        for name, weight in named_weights(layer):
            composed = weight().detach()
            found[f"{index} {name}, composed"] = composed.full_tensor() if isinstance(composed, DTensor) else composed
        if isinstance(layer, FSDPModule):
            layer.reshard()
    return {name: value.clone() for name, value in found.items()}


def write(folder: Path) -> dict[str, int]:
    """Trains in each layout of so many processes, and saves."""
    world, sizes = dist.get_world_size(), {}
    for name, (data, tp) in LAYOUTS[world].items():
        model, optimizer = spread(data, tp, seed=0)
        part = dist.get_rank() // tp  # processes that share matmuls see the same data
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(10 * step + part)
            ids = torch.randint(30, (4, 9), generator=generator)
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        place = folder / f"{world} {name}"
        ranks.example.save(model, optimizer, place, STEPS)
        whole = held(model, optimizer)
        sizes[name] = len(whole)
        if dist.get_rank() == 0:
            torch.save(whole, place / "held.pt")
    dist.barrier()  # nobody reads before all is there
    return sizes


def read(folder: Path) -> dict[str, list[str]]:
    """Reads every checkpoint in each layout of so many processes; returns what differs from the writers, in any bit."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    found = {}
    for place in sorted(folder.glob("*/held.pt")):
        for name, (data, tp) in LAYOUTS[world].items():
            model, optimizer = spread(data, tp, seed=7)  # another start, and other supports
            assert ranks.example.load(model, optimizer, place.parent) == STEPS
            expected, here = torch.load(place), held(model, optimizer)
            assert here.keys() == expected.keys()
            different = [key for key, value in here.items() if not torch.equal(value, expected[key])]
            found[f"{place.parent.name} -> {world} {name}"] = different
    return found


def read_and_write(folder: Path) -> dict[str, list[str]]:
    """What ``read`` and ``write`` do, in one process group: writes first, so that its own are read, too."""
    write(folder)
    return read(folder)


if __name__ == "__main__":
    ranks.main(globals())
