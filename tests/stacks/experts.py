"""What torchrun starts for ``test_experts.py``: experts divided among processes, also with sharded parameters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import ranks
import shared
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import slcompile
from tests.testing import randomize
from tests.zoo import tiny

EXPERTS = {"*.experts": "expert"}
PLANS = {
    "mixtral": {**{f"*.{name}_proj": "column" for name in ("q", "k", "v")}, "*.o_proj": "row", **EXPERTS},
    "gpt_oss": EXPERTS,  # its attention has a number of its own for each head, beside the projections
}
CONFIG = slcompile.SLConfig(rank=8, density=0.0625, seed=0)
STRATIFIED = replace(CONFIG, support="stratified")
SIZES = {"hidden_size": 64, "intermediate_size": 36, "num_hidden_layers": 1}
"""A stack of 72 rows for each expert, whose blocks of 16 rows are shared by two of them."""


def mixture(kind: str, config: slcompile.SLConfig | None, way: str) -> nn.Module:
    """A transformer whose experts are multiplied in one of transformers' ways, with factors that are all random.

    In float64, "grouped_mm" works only where it is compiled.
    """
    torch.manual_seed(0)
    model = tiny(kind, **SIZES, experts_implementation="batched_mm").double()
    if config is not None:
        ids = shared.batch(0, 0)
        slcompile.factorize_(model, config, example_kwargs={"input_ids": ids, "labels": ids, "use_cache": False})
        assert sum(len(each.shape) == 3 for each in weights(model)) == 2 * SIZES["num_hidden_layers"]
        randomize(model)
    model.set_experts_implementation(way)
    return model


def weights(model: nn.Module) -> list[slcompile.SLWeight]:
    return [each for each in model.modules() if isinstance(each, slcompile.SLWeight)]


def compared(
    kind: str,
    config: slcompile.SLConfig | None,
    way: str,
    data: int = 1,
    lowering: str | None = None,
    plan: dict[str, str] | None = None,
    second: bool = False,
) -> dict[str, Any]:
    """A mixture on all processes, ``data`` of which see other sequences, beside the same one on one process.

    ``second``: FSDP cuts stacks in their second dimension.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("data", "tp"))
    alone = mixture(kind, config, "batched_mm")
    model = slcompile.parallelize(mixture(kind, config, way), mesh["tp"], plan or PLANS[kind])
    # Random values tell where they are, as they do without the low-rank part.
    pairs = zip(weights(model), weights(alone), strict=True)
    composed = {str(index): apart(here(), there()) for index, (here, there) in enumerate(pairs)}
    for layer in model.model.layers:
        if lowering is not None:
            layer.compile(backend="sltrain", fullgraph=True, options={**ranks.LIGHT, "lowering": lowering})
        if data > 1:
            fully_shard(layer, mesh=mesh["data"], shard_placement_fn=second_dimension if second else None)
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    losses, gradients = shared.train(model, [mesh.get_local_rank("data")], world)
    expected, expected_gradients = shared.train(alone, list(range(data)), 1)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    pairs = zip(gradients, expected_gradients, strict=True)
    experts = model.model.layers[0].mlp.experts
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "gradients": max(apart(a, b) for a, b in pairs),
        "smallest": min(float(each.abs().max()) for each in expected_gradients),
        "composed": composed,
        "state": max(apart(each, state[name]) for name, each in alone.state_dict().items()),
        "local": {name: list(each.to_local().shape) for name, each in experts.named_parameters()},
    }


def second_dimension(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() == 3 else None


def apart(a: Tensor, b: Tensor) -> float:
    return float((shared.whole(a) - b).detach().abs().max())


def experts(folder: Path) -> dict[str, Any]:
    """One of each: factorized with and without blocks, compiled and not, with biases, and what is refused."""
    if dist.get_world_size() == 4:
        return {"two dimensions": compared("mixtral", CONFIG, "grouped_mm", data=2, lowering="composed")}
    return {
        "mixtral grouped_mm": compared("mixtral", CONFIG, "grouped_mm", lowering="composed"),
        "gpt_oss batched_mm": compared("gpt_oss", STRATIFIED, "batched_mm"),
        "refused": refused(),
        "copy": copied(CONFIG),
    }


def copied(config: slcompile.SLConfig | None) -> float:
    """How far the logits of a copy are from those of the model, whose experts are divided."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = slcompile.parallelize(mixture("gpt_oss", config, "batched_mm"), mesh["tp"], EXPERTS)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # which the copy's are not
    expected = mixture("gpt_oss", config, "batched_mm")
    ids = shared.batch(0, 0)
    return apart(again(input_ids=ids).logits, expected(input_ids=ids).logits)


def more(folder: Path) -> dict[str, Any]:
    if dist.get_world_size() == 4:
        return {
            "four": compared("mixtral", CONFIG, "batched_mm", plan=EXPERTS),
            "dense": compared("gpt_oss", None, "eager", data=2),
        }
    return {
        "mixtral eager": compared("mixtral", CONFIG, "eager"),
        "mixtral batched_mm": compared("mixtral", CONFIG, "batched_mm"),
        "mixtral factored": compared("mixtral", CONFIG, "batched_mm", lowering="factored"),
        "gpt_oss eager": compared("gpt_oss", STRATIFIED, "eager"),
        "gpt_oss grouped_mm": compared("gpt_oss", STRATIFIED, "grouped_mm", lowering="composed"),
        "dense": compared("gpt_oss", None, "batched_mm"),
        "second dimension": compared("mixtral", CONFIG, "batched_mm", data=2, second=True),
    }


class Stacked(nn.Module):
    """A stack in a module that is made by hand."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 32))
        for name, each in held.items():
            setattr(self, name, each)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return x


class OfOne(Stacked):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # what is refused
        return x


def refused() -> list[str]:
    """What is said of each thing that cannot be divided, by two processes; the model is as it was."""
    mesh = init_device_mesh("cpu", (2,))
    odd = tiny("mixtral", num_local_experts=3)
    uniform = mixture("mixtral", replace(CONFIG, support="uniform"), "batched_mm")
    once = slcompile.parallelize(mixture("mixtral", CONFIG, "batched_mm"), mesh, EXPERTS)

    said = []
    for model, plan in (
        (odd, {"*.q_proj": "column", "*.experts": "expert"}),
        (uniform, EXPERTS),
        (tiny("llama"), {"*.mlp": "expert"}),
        (once, EXPERTS),
        (nn.ModuleList([OfOne(num_experts=4)]), {"0": "expert"}),
        (nn.ModuleList([Stacked()]), {"0": "expert"}),
        (nn.ModuleList([Stacked(num_experts=4, norm=nn.LayerNorm(32))]), {"0": "expert"}),
        (tiny("mixtral"), {"*.experts": "experts"}),
        (mixture("mixtral", replace(CONFIG, base="frozen"), "batched_mm"), EXPERTS),
    ):
        before = [(id(each), type(each)) for each in (*model.parameters(), *model.modules())]
        try:
            slcompile.parallelize(model, mesh, plan)
        except ValueError as error:
            said.append(str(error))
        assert [(id(each), type(each)) for each in (*model.parameters(), *model.modules())] == before
    return said


if __name__ == "__main__":
    ranks.main(globals())
