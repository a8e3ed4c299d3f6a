"""What two processes send, take and wait for in a training step under DDP and FSDP2: dense beside ``sltrain``.

    torchrun --standalone --nproc-per-node 2 examples/many_processes.py

Bytes are those that the kernel counts on a process's own TCP connections; those that ``estimate_many`` foresaw stand
beside them. Needs ``pip install "slcompile[examples]"``; a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from flags import option, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import slcompile
from slcompile.memory.many import Share, estimate_many
from slcompile.memory.sharding import SCATTER, Layout
from slcompile.models import KNOWN, known_config
from slcompile.ops.sparse_cpu import kept_bytes

WAYS = ("ddp", "fsdp")
BYTES_ACKED = 120  # where tcpi_bytes_acked lies in the kernel's struct tcp_info; without what was sent again


def loss_of(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden[:, :-1], head).flatten(0, 1), ids[:, 1:].flatten())


class Trained(nn.Module):
    """A LLaMA and its loss, which is compiled by itself: otherwise it would be most of the memory."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(config)
        self.loss: Callable[..., Tensor] = loss_of

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.llama.model(input_ids=ids, use_cache=False)[0]
        return self.loss(hidden, self.llama.lm_head.weight, ids)


class Run:
    """A model that trains, as one process of several."""

    def __init__(
        self, config: Any, sl: slcompile.SLConfig | None, way: str, batch: int, length: int, layers_only: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.model = model = Trained(config)
        if sl is not None:
            slcompile.factorize_(model, sl)
        model.loss = torch.compile(loss_of)
        layers = list(model.llama.model.layers)
        for layer in layers:
            layer.compile(backend="inductor" if sl is None else "sltrain")
        if layers_only:
            model.requires_grad_(False)
            for layer in layers:
                layer.requires_grad_(True)
        self.call: nn.Module = model
        if way == "ddp":
            self.call = nn.parallel.DistributedDataParallel(model)
        else:
            for layer in layers:
                fully_shard(layer)
            if not layers_only:
                fully_shard(model)
        trained = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.ids = torch.randint(config.vocab_size, (batch, length), generator=generator)

    def step(self) -> None:
        self.call(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, int]:
        """Bytes that are there between two steps, after the first one, by what they are for."""
        state = [each for states in self.optimizer.state.values() for each in states.values()]
        buckets = sum(each.nbytes for each in self.model.parameters() if each.requires_grad)
        return {
            "parameters": nbytes(self.model.parameters()),
            "buffers": nbytes(self.model.buffers()),
            "optimizer state": nbytes(each for each in state if each.dim()),
            "DDP's buckets": buckets if isinstance(self.call, nn.parallel.DistributedDataParallel) else 0,
            "indices": kept_bytes(),
        }

    def seconds(self) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.step()
        dist.barrier()
        return time.perf_counter() - start

    def sent(self) -> int:
        """Bytes that this process sends in a step."""
        dist.barrier()
        before = bytes_sent()
        self.step()
        dist.barrier()
        return bytes_sent() - before


def bytes_sent() -> int:
    """Bytes that this process sent over its open TCP connections so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if not os.path.lexists(link) or not os.readlink(link).startswith("socket:"):
            continue
        connection = socket.socket(fileno=int(name))
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
            total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
        connection.detach()  # it stays open
    return total


def peak_above(step: Callable[[], Any]) -> int:
    """The most bytes allocated at one time in a step that leaves nothing behind.

    gloo frees some of its copies of messages in threads that the profiler does not see. What a step seems to leave is
    of those, and is not counted.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    events = []
    for event in waiting:  # grows
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort(key=lambda each: each[0])
    sizes = [size for _, _, size in events]
    held: dict[int, int] = {}  # address -> position of the allocation
    for position, (_, pointer, size) in enumerate(events):
        if size < 0:
            held.pop(pointer, None)
            continue
        if pointer in held:  # freed unseen
            sizes[held[pointer]] = 0
        held[pointer] = position
    for position in held.values():
        sizes[position] = 0
    return max(itertools.accumulate(sizes), default=0)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, of this process's shards where they are sharded."""
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)


def estimated(config: Any, sl: slcompile.SLConfig, way: str, batch: int, length: int) -> dict[str, Share]:
    """The estimates for two processes, dense and factorized."""
    with torch.device("meta"):
        model, ids = Trained(config), torch.empty(batch, length, dtype=torch.int64)
    layout = Layout(dist.get_world_size(), fsdp=way == "fsdp")
    (report,) = estimate_many(model, (ids,), layouts=[layout], config=sl, device="cpu")
    return {"dense": report.dense, "sltrain": report.sltrain}


def over_gloo(share: Share) -> int:
    """Bytes that a process sends with gloo, whose reduce-scatter sends as much as its all-reduce: twice a ring's."""
    return share.wire + share.sent.get(SCATTER, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=KNOWN, default="llama-60m")
    parser.add_argument("--rank", type=option("rank"), default=128)
    parser.add_argument("--density", type=option("density"), default=0.03)
    parser.add_argument("--batch", type=whole(1), default=2)
    parser.add_argument("--length", type=whole(1), default=256)
    parser.add_argument("--steps", type=whole(1), default=7)
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"start it by torchrun: torchrun --standalone --nproc-per-node 2 {sys.argv[0]}")
    dist.init_process_group("gloo")
    say = print if dist.get_rank() == 0 else lambda *_: None
    config = known_config(args.model)
    sl = slcompile.SLConfig(rank=args.rank, density=args.density, seed=0)
    shape = (args.batch, args.length)
    say(f"{args.model}, {dist.get_world_size()} processes, each with {args.batch} x {args.length} tokens, float32")
    for way in WAYS:
        runs = {"dense": Run(config, None, way, *shape), "sltrain": Run(config, sl, way, *shape)}
        for run in runs.values():
            run.step()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.steps):
            for name, run in runs.items():
                times[name].append(run.seconds())
        seconds = {name: statistics.median(each) for name, each in times.items()}
        sent = {name: run.sent() for name, run in runs.items()}
        del runs, run
        gc.collect()
        alone = {}
        for name, config_of in (("dense", None), ("sltrain", sl)):
            run = Run(config, config_of, way, *shape, layers_only=True)
            run.step()
            alone[name] = run.sent()
            del run
            gc.collect()
        shares = estimated(config, sl, way, *shape) if dist.get_rank() == 0 else {}  # the same on all
        for what, found, digits in (
            ("sent (MB)", sent, 1e6),
            ("estimated (MB)", {name: over_gloo(share) for name, share in shares.items()}, 1e6),
            ("of the layers (MB)", alone, 1e6),
            ("step (ms)", seconds, 1e-3),
        ):
            if dist.get_rank() == 0:
                dense, factorized = found["dense"], found["sltrain"]
                print(f"{way:5}{what:20}{dense / digits:10.1f}{factorized / digits:10.1f}{factorized / dense:8.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
