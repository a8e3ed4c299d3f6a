"""What training known models takes on each of 8, 64 and 512 GPUs, and the largest that fits: dense beside ``sltrain``.

    python examples/many_gpus.py

Estimated without a GPU: parameters sharded by FSDP2, one sequence of 2048 tokens on each GPU, bfloat16, AdamW. Needs
``pip install "slcompile[examples]"``; ten minutes on a busy CPU core.
"""

from __future__ import annotations

import argparse

import torch
from flags import option, whole

import slcompile
from slcompile.memory.many import ManyReport, Share, estimate_many
from slcompile.memory.sharding import Layout
from slcompile.models import KNOWN, known_config

MODELS = (
    "llama-1b", "llama-7b", "llama-13b", "llama-33b", "llama-3-8b", "llama-3-70b", "llama-3-405b", "mixtral-8x7b",
)  # fmt: skip
SHOWN = ("llama-1b", "llama-7b", "llama-13b", "llama-3-8b", "llama-3-70b", "mixtral-8x7b")
GPUS = (1, 8, 64, 512)
SIZES = (24, 40, 80)
MARGIN = 0.9
"""The share of a GPU that tensors may take; an allocator's rounding and a context take the rest."""


def reports(model: str, config: slcompile.SLConfig, length: int) -> dict[int, ManyReport]:
    """The estimate for each number of GPUs."""
    ids = torch.empty(1, length, dtype=torch.int64, device="meta")
    found = estimate_many(
        known_config(model),
        kwargs={"input_ids": ids, "labels": ids},
        layouts=[Layout(gpus) for gpus in GPUS],
        config=config,
        dtype=torch.bfloat16,
    )
    return dict(zip(GPUS, found, strict=True))


def largest(shares: dict[str, Share], size: int) -> str:
    """The name of the model with the most parameters whose peak fits a GPU of so many GB."""
    fitting = [name for name, share in shares.items() if share.peak <= MARGIN * size * 1e9]
    return max(fitting, key=lambda name: shares[name].parameter_count, default="-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=KNOWN)
    parser.add_argument("--rank", type=option("rank"), default=0.25)
    parser.add_argument("--density", type=option("density"), default=0.03)
    parser.add_argument("--length", type=whole(1), default=2048)
    args = parser.parse_args()
    config = slcompile.SLConfig(rank=args.rank, density=args.density)
    print("| | GPUs | GB on each, dense | sltrain | of dense | GB sent in a step, dense | sltrain | of dense |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found = {}
    for model in args.models:
        found[model] = reports(model, config, args.length)
        for gpus, report in found[model].items() if model in SHOWN else ():
            if gpus > 1:
                dense, ours = report.dense, report.sltrain
                memory = f"{dense.peak / 1e9:.2f} | {ours.peak / 1e9:.2f} | {ours.peak / dense.peak:.0%}"
                wire = f"{dense.wire / 1e9:.1f} | {ours.wire / 1e9:.1f} | {ours.wire / dense.wire:.0%}"
                print(f"| {model} | {gpus} | {memory} | {wire} |", flush=True)
    print("\n| the largest that fits | " + " | ".join(f"{size} GB, dense | sltrain" for size in SIZES) + " |")
    print("|---" * (1 + 2 * len(SIZES)) + "|")
    for gpus in GPUS:
        cells = []
        for size in SIZES:
            cells.append(largest({model: each[gpus].dense for model, each in found.items()}, size))
            cells.append(largest({model: each[gpus].sltrain for model, each in found.items()}, size))
        print(f"| {gpus} GPU{'s' * (gpus > 1)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
