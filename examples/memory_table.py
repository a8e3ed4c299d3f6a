"""The memory of the paper's models (SLTrain, arXiv 2406.02214), estimated without a GPU and held against its figures.

    python examples/memory_table.py
    python examples/memory_table.py --only reality

Needs ``pip install "slcompile[examples]"``. About seven minutes on two CPU cores; nothing but ``reality`` needs memory.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaForCausalLM

import slcompile
from slcompile.benchmark import peak_above
from slcompile.memory.estimate import estimate_memory, held_memory
from slcompile.memory.report import Usage
from slcompile.models import known_config
from slcompile.ops.sparse_cpu import kept_bytes
from slcompile.passes.liveness import PARTS

PARTS_OF_PAGE = ("table", "figure", "reality")

RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512}

PRINTED = {
    "llama-60m": {"dense": ("58.2", "0.35"), "low_rank": ("42.8", "0.24"), "sltrain": ("43.5", "0.26")},
    "llama-130m": {"dense": ("134.1", "0.81"), "low_rank": ("94.0", "0.57"), "sltrain": ("96.6", "0.60")},
    "llama-350m": {"dense": ("368.0", "2.21"), "low_rank": ("185.2", "1.11"), "sltrain": ("194.3", "1.24")},
    "llama-1b": {"dense": ("1339", "8.04"), "low_rank": ("609", "3.66"), "sltrain": ("645.6", "4.16")},
}
"""The paper's table 2: parameters (M), and parameters + Adam's moments + indices (GB)."""

MEASURED = {
    "llama-350m": (256, 0.03, {"Adam": 4.5, "8-bit Adam per layer": 3.5, "8-bit SLTrain per layer": 2.2}),
    "llama-1b": (512, 0.03, {"Adam": 16.3, "8-bit Adam per layer": 11.8, "8-bit SLTrain per layer": 6.8}),
    "llama-7b": (1024, 0.05, {"Adam": 67.4, "8-bit Adam per layer": 29.4, "8-bit SLTrain per layer": 18.3}),
}
"""Rank, density, and the paper's measured memory of training on one GPU (GB), batch 1, bfloat16."""

console = Console(highlight=False, width=120 if not sys.stdout.isatty() else None)


@dataclass(frozen=True)
class Cell:
    """One variant in the paper's table.

    Attributes:
        parameters: Their number.
        paper: Bytes as the paper counts them: bfloat16 parameters, two moments, an int64 for each non-zero.
        stratified: Bytes with the stratified support, which stores no index; that of the variant itself elsewhere.
    """

    parameters: int
    paper: int
    stratified: int


def static_bytes(usage: Usage) -> int:
    """Parameters, moments, indices."""
    return sum(usage.largest[part] for part in ("parameters", "optimizer state", "indices"))


def paper_table() -> dict[str, dict[str, Cell]]:
    """Model -> variant -> what the estimator says of it."""
    found = {}
    for name, rank in RANKS.items():
        supports = {
            support: held_memory(
                known_config(name),
                config=slcompile.SLConfig(rank=rank, density=0.03, support=support),
                dtype=torch.bfloat16,
            )
            for support in ("uniform", "stratified")
        }
        found[name] = {
            # An int32 index is counted twice: the paper's takes eight bytes.
            variant: Cell(
                usage.parameter_count,
                static_bytes(usage) + usage.largest["indices"],
                static_bytes(supports["stratified"][variant]),
            )
            for variant, usage in supports["uniform"].items()
        }
    return found


def difference(ours: float, printed: str) -> float:
    """How far a printed figure is from ours, relatively; 0 where it is ours, rounded to as many decimals."""
    decimals = len(printed.partition(".")[2])
    return 0.0 if f"{ours:.{decimals}f}" == printed else float(printed) / ours - 1


def show_table() -> None:
    table = Table(title="Parameters (M) / parameters + Adam + indices (GB), bfloat16", title_justify="left")
    for column in ("", "ours, as the paper counts", "the paper", "stratified support (GB)"):
        table.add_column(column, justify="left" if not column else "right")
    apart = []
    for name, variants in paper_table().items():
        for variant in ("dense", "low_rank", "sltrain"):
            cell, (millions, gigabytes) = variants[variant], PRINTED[name][variant]
            ours = cell.parameters / 1e6, cell.paper / 1e9
            stratified = f"{cell.stratified / 1e9:.3f}" if variant == "sltrain" else ""
            label = f"{name} {variant.replace('_', ' ')}"
            table.add_row(label, f"{ours[0]:.1f} / {ours[1]:.3f}", f"{millions} / {gigabytes}", stratified)
            for what, own, printed in (("M parameters", ours[0], millions), ("GB", ours[1], gigabytes)):
                apart_by = difference(own, printed)
                if apart_by:
                    apart.append(f"{label}: {own:.5g} {what}, the paper {printed} ({apart_by:+.1%})")
    console.print(table)
    console.print("\n".join(["Not what the formula gives, rounded:", *apart]))


def show_figure() -> None:
    table = Table(title="Peak of a step, batch 1 x 256 tokens, bfloat16 (GB)", title_justify="left")
    for column in ("", "ours", "paper", "ours ÷ paper's Adam", "what it is at our peak"):
        table.add_column(column, justify="right" if column not in ("", "what it is at our peak") else "left")
    ids = torch.empty(1, 256, dtype=torch.int64, device="meta")
    for name, (rank, density, paper) in MEASURED.items():
        common: dict[str, Any] = {
            "kwargs": {"input_ids": ids, "labels": ids},
            "config": slcompile.SLConfig(rank=rank, density=density),
            "dtype": torch.bfloat16,
        }
        plain = estimate_memory(known_config(name), optimizer="adamw-foreach", **common)
        small = estimate_memory(known_config(name), optimizer="adamw8bit", per_layer=True, **common)
        usages = (plain.dense, small.dense, small.sltrain)
        for (row, printed), usage in zip(paper.items(), usages, strict=True):
            parts = {part: usage.at_peak[part] / 1e9 for part in PARTS}
            what = ", ".join(f"{part} {size:.2f}" for part, size in parts.items() if size >= 0.005)
            share = f"{usage.peak / 1e9 / paper['Adam']:.0%}"
            table.add_row(f"{name} {row}", f"{usage.peak / 1e9:.2f}", f"{printed}", share, what)
    console.print(table)


def training_bytes(run: Callable[..., Any], model: nn.Module, batch: int, vocab: int) -> int:
    """Peak allocated bytes of a real step on the CPU, the third one, with a fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(vocab, (batch, 256))

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    held = sum(3 * each.nbytes for each in model.parameters()) + sum(each.nbytes for each in model.buffers())
    return held + kept_bytes() + peak_above(step, "cpu")


def compared(config: Any, sl: slcompile.SLConfig, batch: int, factorized: bool) -> tuple[int, int]:
    """Estimated and real peak of a step of a causal language model, batch x 256 tokens, float32, on the CPU."""
    ids = torch.empty(batch, 256, dtype=torch.int64, device="meta")
    report = estimate_memory(config, kwargs={"input_ids": ids, "labels": ids}, config=sl, device="cpu")
    torch._dynamo.reset()
    gc.collect()  # what is left of another model would count
    model = LlamaForCausalLM(config)
    if factorized:
        slcompile.factorize_(model, sl)
        run = torch.compile(
            model,
            backend="sltrain",
            options={name: getattr(sl, name) for name in ("lowering", "save", "memory_budget")},
        )
    else:
        run = torch.compile(model)
    real = training_bytes(run, model, batch, config.vocab_size)
    return (report.sltrain if factorized else report.dense).peak, real


def show_reality() -> None:
    table = Table(title="Peak of a real step of the 60M model on the CPU, float32 (MB)", title_justify="left")
    for column in ("", "estimate", "measured", "estimate ÷ measured"):
        table.add_column(column, justify="left" if not column else "right")
    for lowering in (None, "auto", "composed"):
        for batch in (1, 2):
            sl = slcompile.SLConfig(rank=128, density=0.03, lowering=lowering or "auto")
            config = known_config("llama-60m")
            config.use_cache = False
            estimate, real = compared(config, sl, batch, factorized=lowering is not None)
            label = f"{'dense Inductor' if lowering is None else 'sltrain ' + lowering}, batch {batch} x 256"
            table.add_row(label, f"{estimate / 1e6:.2f}", f"{real / 1e6:.2f}", f"{estimate / real:.3f}")
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS_OF_PAGE, default=PARTS_OF_PAGE, help="what to print")
    args = parser.parse_args(argv)
    shows = {"table": show_table, "figure": show_figure, "reality": show_reality}
    for name in args.only:
        shows[name]()
        console.print()


if __name__ == "__main__":
    main()
