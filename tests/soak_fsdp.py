"""Thousands of tiny steps under FSDP2: ``torchrun --standalone --nproc-per-node 2 -m tests.soak_fsdp``.

Layers are compiled by ``sltrain`` and sharded, steps of factors are limited, and each tenth of the steps ends with a
checkpoint that is written and read. What must not grow is read on each process after each tenth; from the first reading
to the last, memory may grow by little (``SLACK``), and anything else not at all.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import slcompile
from tests import soak
from tests.testing import LITE, example

TENTHS = 10
RESIDENT, IN_USE = "resident bytes", "bytes in use of malloc"
SLACK = {RESIDENT: 8 * 2**20, IN_USE: 2 * 2**20}
"""What may be more at the end, in bytes; torch keeps a little of each checkpoint."""


class Malloc(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def bytes_in_use() -> int:
    """Returns what glibc's malloc gave out and nobody freed: Python's and torch's larger objects, and all tensors."""
    read = ctypes.CDLL(None).mallinfo2
    read.restype = Malloc
    found = read()
    return int(found.uordblks + found.hblkhd)


class Nets(nn.Module):
    """Two layers, and a head that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(soak.Net() for _ in range(2))
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def trained(
    steps: int, folder: Path, say: Callable[[str], None], options: dict[str, Any] | None = None
) -> list[dict[str, int]]:
    """Trains for so many steps as one of several processes; returns the readings after each tenth."""
    script = example("pretrain_distributed")
    torch.manual_seed(0)
    model = slcompile.factorize_(Nets(), slcompile.SLConfig(rank=8, density=0.05, seed=0))
    for layer in model.layers:
        layer.compile(backend="sltrain", fullgraph=True, options=options)
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    limit = slcompile.limit_steps(model, optimizer)
    generator = torch.Generator().manual_seed(dist.get_rank())
    found, losses = [], []
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        x = torch.randn(16, 64, generator=generator)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % (steps // TENTHS) == 0:
            script.save(model, optimizer, folder, step)
            assert script.load(model, optimizer, folder) == step
            found.append({**soak.readings(), IN_USE: bytes_in_use()})
            mean = sum(losses) / len(losses)
            losses.clear()
            assert mean < 2, mean  # of noise, and never NaN
            say(f"{time.perf_counter() - begin:6.0f} s  {step} steps, loss {mean:.4f}: {json.dumps(found[-1])}")
    say(f"{limit.limited} steps of factors were limited")
    return found


def grown(first: dict[str, int], last: dict[str, int]) -> list[str]:
    """Says what grew by more than it may."""
    more = [name for name in first if last[name] > first[name] + SLACK.get(name, 0)]
    return [f"{name}: {first[name]:,} -> {last[name]:,}" for name in more]


def main() -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m tests.soak_fsdp", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--after", type=int, default=1, choices=range(1, TENTHS), help="the tenth that is compared with"
    )
    parser.add_argument("--lite", action="store_true", help="call ATen instead of compiling C++")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # One folder for all: that of the first process.
    folders = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folders)

    def say(text: str) -> None:
        print(f"[{rank}] {text}", flush=True)

    found = trained(args.steps, Path(folders[0]), say, LITE if args.lite else None)
    first, last = found[args.after - 1], found[-1]
    more = grown(first, last)
    for name in first:
        say(f"| {name} | {first[name]:,} | {last[name]:,} |")
    say(f"grew: {', '.join(more) or 'nothing'}")
    dist.barrier()  # else the first one to end with an error stops the others before they say what they found
    if rank == 0:
        shutil.rmtree(folders[0])
    dist.destroy_process_group()
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
