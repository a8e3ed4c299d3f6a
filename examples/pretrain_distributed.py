"""Trains a byte-level transformer with ``backend="sltrain"`` on several processes, its factors sharded by FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/pretrain_distributed.py          # two CPU processes

On 4 nodes of 8 GPUs, the same command on each of them:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/pretrain_distributed.py --width 2048 --layers 24 --context 1024 --batch 256 --steps 10000

The model is made on the meta device, factorized there, and given memory layer by layer, each of which is sharded at
once: no process ever holds a dense weight, or whole factors of more than one layer. Start, batches and losses are the
same on any number of processes.

Started again, on any number of processes, it goes on from the last checkpoint. One is written every ``--save-every``
steps, beside the others, and moved into place when it is whole: whichever process is killed, and when, the last whole
one is there. A process that does not come to a step within ``--timeout`` seconds ends the training with an error that
names its rank. The text is the Python source of torch itself, unless ``--text`` names a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from flags import above_0, file, folder, option, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import slcompile
from slcompile.optim.low_bit import LowBitPlanner

VOCABULARY = 256
FLAGS_OF_NO_EFFECT = {"steps", "save_every", "log_every", "timeout", "out"}  # on what a step computes


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.embed_position = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.embed_position.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def sharded(model: nn.Module, config: slcompile.SLConfig, device: torch.device, seed: int) -> nn.Module:
    """Factorizes a model on the meta device, then gives memory to a layer, draws its start and shards it, one by one.

    Every process draws the same whole layer and keeps its rows, so that the start is that of any number of processes.
    """
    slcompile.factorize_(model, config)
    torch.manual_seed(seed)
    rest = [each for each in model.children() if each is not model.layers]
    for part in (*model.layers, *rest):
        part.to_empty(device=device)
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if part not in rest:
            part.compile(backend="sltrain", fullgraph=True)  # equal layers share one compiled graph
            fully_shard(part)
    return fully_shard(model)


def batches(text: Tensor, size: int, context: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step: this process's share of [size, context], the same after a restart."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - context - 1, (size,), generator=generator)
    own = starts.chunk(dist.get_world_size())[dist.get_rank()]
    windows = torch.stack([text[start : start + context + 1] for start in own]).long()
    return windows[:, :-1], windows[:, 1:]


def read_text(path: Path | None) -> Tensor:
    files = [path] if path else sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def count(parameters: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in parameters)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Each process writes its own shards beside the checkpoints of other steps; the first one moves them into place."""
    weights, states = get_state_dict(model, optimizer)
    unfinished, whole = folder / "unfinished", folder / f"step-{step:08}"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    dist.barrier()
    dcp.save({"model": weights, "optimizer": states, "step": torch.tensor(step)}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        older = checkpoints(folder)
        unfinished.rename(whole)
        for each in older:
            shutil.rmtree(each)
    dist.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, the oldest first: several where a process was killed before it removed the older ones."""
    return sorted(folder.glob("step-*"))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Reads the last checkpoint, which any number of processes wrote; returns its step, 0 where there is none."""
    found = checkpoints(folder)
    if not found:
        return 0
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "step": torch.tensor(0)}
    # With 8- or 4-bit states, which not every number of processes can read, refuses before anything is overwritten.
    dcp.load(state, checkpoint_id=found[-1], planner=LowBitPlanner(optimizer))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def require_flags(args: argparse.Namespace) -> None:
    """Notes the flags of a training that begins; ends one that would go on with others.

    The optimizer's state brings its learning rate, and the batches those of other steps: nothing else would be said.
    """
    path = args.out / "flags.json"
    flags = {name: str(value) for name, value in vars(args).items() if name not in FLAGS_OF_NO_EFFECT}
    if checkpoints(args.out / "checkpoints"):
        for name, before in json.loads(path.read_text()).items():
            if before != flags.get(name):
                flag = f"--{name.replace('_', '-')}"
                sys.exit(
                    f"{args.out} was made with {flag} {before}, got {flags.get(name)}: give that, or another --out"
                )
    elif int(os.environ["RANK"]) == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(flags, indent=1) + "\n")


@contextlib.contextmanager
def naming_absent(group: dist.ProcessGroup, seconds: float) -> Iterator[None]:
    """Calls the roll of a gloo group before and, where something failed, after: the error names who did not answer."""
    timeout = timedelta(seconds=seconds)  # that of the group does not count
    dist.monitored_barrier(group, timeout, wait_all_ranks=True)
    try:
        yield
    except RuntimeError:  # a collective says not for whom it waited
        dist.monitored_barrier(group, timeout, wait_all_ranks=True)
        raise


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 128), ("heads", 4), ("layers", 4), ("context", 128), ("batch", 16), ("steps", 100)):
        parser.add_argument(f"--{name}", type=whole(1), default=default)
    parser.add_argument("--lr", type=above_0, default=3e-3)
    parser.add_argument("--rank", type=option("rank"), default=0.25, help="an int, or a fraction of the smaller side")
    parser.add_argument("--density", type=option("density"), default=0.03)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--text", type=file)
    parser.add_argument("--save-every", type=whole(1), default=50, help="steps")
    parser.add_argument("--log-every", type=whole(1), default=10, help="steps")
    parser.add_argument("--timeout", type=above_0, default=600, help="seconds that a process may be late")
    parser.add_argument("--out", type=folder, default="runs/distributed")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"start it by torchrun: torchrun --standalone --nproc-per-node 2 {sys.argv[0]}")
    world = int(os.environ["WORLD_SIZE"])
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads {args.heads}, got {args.width}")
    if args.batch % world:
        parser.error(f"--batch must be a multiple of the {world} processes, got {args.batch}")
    return args


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    roll: dist.ProcessGroup,
    args: argparse.Namespace,
) -> dict[int, float]:
    """Goes on from the last checkpoint; returns the losses that were logged, by step."""
    text, losses = read_text(args.text), {}
    for step in range(load(model, optimizer, args.out / "checkpoints") + 1, args.steps + 1):
        with naming_absent(roll, args.timeout):
            ids, targets = (each.to(device) for each in batches(text, args.batch, args.context, step))
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % args.log_every == 0 or step == args.steps:
                dist.all_reduce(loss.detach_())
                losses[step] = loss.item() / dist.get_world_size()
                if dist.get_rank() == 0:
                    print(f"step {step}: loss {losses[step]:.3f}", flush=True)
            if step % args.save_every == 0 or step == args.steps:
                save(model, optimizer, args.out / "checkpoints", step)
    return losses


def main() -> dict[int, float]:
    args = parse_args()
    require_flags(args)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=args.timeout))
    roll = dist.new_group(backend="gloo")  # beside whatever carries the tensors
    say = print if dist.get_rank() == 0 else lambda *_: None

    shape = (args.width, args.heads, args.layers, args.context)
    config = slcompile.SLConfig(rank=args.rank, density=args.density, seed=args.seed)
    with torch.device("meta"):
        model = Transformer(*shape)
    dense = count(model.parameters())
    with naming_absent(roll, args.timeout):
        sharded(model, config, device, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    local = count(each.to_local() for each in model.parameters())
    say(f"{dense:,} parameters when dense, {count(model.parameters()):,} now, {local:,} of them here")
    losses = train(model, optimizer, device, roll, args)

    # Whole factors on the first process, which merges them and writes one weight at a time.
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        with torch.device("meta"):
            alone = slcompile.factorize_(Transformer(*shape), config)
        alone.load_state_dict(whole, assign=True)
        say(f"wrote {slcompile.save_merged(alone, args.out / 'dense')}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
