"""``slcompile rates``: by which rates lowerings are chosen."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from slcompile import cost
from slcompile.measure import measure_rates


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rates",
        help="show the device's rates, by which the lowering of each matmul is chosen",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="show the rates of cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="use so many threads of the CPU")
    parser.add_argument("--measure", action="store_true", help="measure and store them for later compiles")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu, or cuda where there is a GPU, got {args.device}")
    cores = os.cpu_count() or 1
    if not 1 <= args.threads <= cores:
        raise ValueError(f"--threads must be in [1, {cores}], the machine's cores, got {args.threads}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.measure:
        found, path = measure_rates(device)
        print(f"measured, stored in {path}")
    else:
        found = cost.rates(device)
        stored = cost.stored_rates(device)
        print(f"from {stored}" if stored else "defaults of the device's class; --measure measures them")
    kinds = {"dense matmul": found.matmul, "sparse matmul": found.sparse, "vector matmul": found.vector}
    for kind, by_dtype in kinds.items():
        if not by_dtype:
            continue
        print(f"{kind:14} " + ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in by_dtype.items()) + "  GFLOP/s")
    print(f"{'memory':14} {found.memory / 1e9:.4g}  GB/s")
    print(f"{'positions':14} {found.entries / 1e6:.4g}  million/s")
    if found.launch:
        print(f"{'launch':14} {found.launch * 1e6:.3g}  us")
        print(f"{'of matmul':14} {found.narrow:.2f} through the rank, {found.tiled:.2f} in tiles of S, ", end="")
        print(f"{found.own:.2f} in the vector support's kernels")
        print(f"{'gathers':14} {found.gathers / 1e9:.4g}  GB/s")
