"""What torchrun starts for ``test_parallel.py``: matmuls shared by processes, also with sharded parameters."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slcompile

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.testing import randomize
from tests.zoo import tiny

PLAN = {
    **{f"*.{name}_proj": "column" for name in ("q", "k", "v", "gate", "up")},
    **{f"*.{name}_proj": "row" for name in ("o", "down")},
}
STEPS = 3
CONFIGS = {
    "stratified": slcompile.SLConfig(rank=8, density=0.0625, seed=0),
    "vector": slcompile.SLConfig(rank=8, density=0.0625, seed=0, support="vector", vector=8),
}


def llama(config: slcompile.SLConfig | None) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny("llama", num_hidden_layers=2, attention_bias=True, **sizes).double()
    return model if config is None else randomize(slcompile.factorize_(model, config))


def batch(step: int, part: int) -> Tensor:
    return torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(10 * step + part))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train(model: nn.Module, parts: list[int], world: int) -> tuple[list[float], list[Tensor]]:
    """Trains on some of the parts of each batch; returns losses, and the first step's gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], []
    for step in range(STEPS):
        total = 0.0
        for part in parts:
            ids = batch(step, part)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = [whole(each.grad).clone() for each in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ranks.mean(torch.tensor(total), world))
    return losses, gradients


def compared(config: slcompile.SLConfig | None, data: int, compiled: bool = False) -> dict[str, Any]:
    """A model on all processes, ``data`` of which see other sequences, beside the same model on one process."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("data", "tp"))
    alone = llama(config)
    model = slcompile.parallelize(copy.deepcopy(alone), mesh["tp"], PLAN)
    composed = {}
    if config is not None:
        pairs = zip(model.model.layers, alone.model.layers, strict=True)
        for shared, own in pairs:
            for name in ("q_proj", "o_proj"):
                here, there = (getattr(each.self_attn, name).weight_sl for each in (shared, own))
                # Values that tell where they are, without the low-rank part.
                composed[name] = float((whole(here()) - there()).detach().abs().max())
    for layer in model.model.layers:
        if compiled:
            layer.compile(backend="sltrain", options=ranks.LIGHT)
        if data > 1:
            fully_shard(layer, mesh=mesh["data"])
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    losses, gradients = train(model, [mesh.get_local_rank("data")], world)
    expected, expected_gradients = train(alone, list(range(data)), 1)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    pairs = [(gradients[i], each) for i, each in enumerate(expected_gradients)]
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "gradients": max(float((a - b).abs().max()) for a, b in pairs),
        "composed": composed,
        "state": max(float((each - state[name]).abs().max()) for name, each in alone.state_dict().items()),
        "local": [list(each.to_local().shape) for each in model.model.layers[0].self_attn.q_proj.parameters()],
    }


def shared(folder: Path) -> dict[str, Any]:
    if dist.get_world_size() == 4:
        return {"two dimensions": compared(CONFIGS["stratified"], 2)}
    found = {name: compared(config, 1) for name, config in CONFIGS.items()}
    found["dense"] = compared(None, 1)
    found["compiled"] = compared(CONFIGS["stratified"], 1, compiled=True)
    return {**found, "refused": refused(), "again": again()}


def refused() -> list[str]:
    """What is said of each thing that cannot be shared, by two processes; the model is as it was."""
    mesh, config = init_device_mesh("cpu", (2,)), CONFIGS["stratified"]
    odd = slcompile.SLConfig(rank=8, density=0.05, seed=0)
    uniform = slcompile.SLConfig(rank=8, density=0.0625, seed=0, support="uniform")
    once = slcompile.parallelize(llama(config), mesh, PLAN)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64))
    said = []
    for model, asked_mesh, plan in (
        (llama(odd), mesh, PLAN),
        (llama(uniform), mesh, PLAN),
        (llama(config), mesh, {"*.q_proj": "columns"}),
        (llama(config), mesh, {"*.query": "column"}),
        (llama(config), init_device_mesh("cpu", (1, 2)), PLAN),
        (nn.Sequential(nn.Linear(64, 63)), mesh, {"*": "column"}),
        (once, mesh, PLAN),
        (empty, mesh, {"*": "row"}),
    ):
        before = [id(each) for each in model.parameters()]
        try:
            slcompile.parallelize(model, asked_mesh, plan)
        except ValueError as error:
            said.append(str(error))
        assert [id(each) for each in model.parameters()] == before
    return said


def again() -> dict[str, float]:
    """A new start and a loaded one: each process has the same whole factors, and the support goes with the seed."""
    mesh, config = init_device_mesh("cpu", (2,)), CONFIGS["stratified"]
    model = slcompile.parallelize(llama(config), mesh, PLAN)
    torch.manual_seed(dist.get_rank())
    for module in model.modules():
        if isinstance(module, slcompile.SLWeight):
            module.reset_parameters()
    wholes = [each.to_local() for name, each in model.named_parameters() if name.endswith("q_proj.weight_sl.A")]
    apart = max(float((each - dist_mean(each)).abs().max()) for each in wholes)
    other = llama(slcompile.SLConfig(rank=8, density=0.0625, seed=5))  # its non-zeros are elsewhere
    saved = slcompile.parallelize(copy.deepcopy(other), mesh, PLAN).state_dict()
    model.load_state_dict(saved)
    pairs = zip(model.model.layers, other.model.layers, strict=True)
    loaded = [whole(a.mlp.down_proj.weight_sl()) - b.mlp.down_proj.weight_sl() for a, b in pairs]
    return {"apart": apart, "loaded": max(float(each.detach().abs().max()) for each in loaded)}


def dist_mean(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


if __name__ == "__main__":
    ranks.main(globals())
