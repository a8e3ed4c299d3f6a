"""``slcompile bench``: how long a step of a model takes on this machine, dense beside factorized."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from slcompile.benchmark import MODES, VARIANTS, BenchReport, bench
from slcompile.cli.sources import add_factory, errors_of, from_factory, literals, sl_config
from slcompile.files import writable_file, write_text


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time a model's step, dense beside factorized: step time, tokens/s, peak memory, compile time",
    )
    add_factory(parser)
    parser.add_argument(
        "--inductor",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="set Inductor's own settings for all variants, such as triton.cudagraphs=True",
    )
    parser.add_argument(
        "--lowerings",
        nargs="+",
        choices=VARIANTS,
        help="measure these beside the dense model (default: the config's)",
    )
    parser.add_argument("--mode", choices=MODES, default="training", help="default: training")
    parser.add_argument("--runs", type=int, default=15, help="time so many runs of each variant (default: 15)")
    parser.add_argument("--device", help="move the model there first (default: where the factory made it)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.json is not None:
        writable_file(args.json)  # before the work, not after it
    if args.runs < 3:
        raise ValueError(f"--runs must be at least 3, got {args.runs}")
    device = None if args.device is None else _device(args.device)
    config, inductor = sl_config(args.config), literals("--inductor", args.inductor)
    model, inputs, kwargs = from_factory(args.factory)
    if device is not None:
        model.to(device)
    with errors_of(f"measuring {args.factory}"):
        report = bench(
            model,
            inputs,
            kwargs,
            config=config,
            lowerings=args.lowerings,
            mode=args.mode,
            runs=args.runs,
            inductor=inductor,
        )
    show(report)
    if args.json is not None:
        print(f"wrote {write_text(args.json, json.dumps(report.to_dict(), indent=1) + chr(10))}")


def show(report: BenchReport) -> None:
    """Prints a report: as a table of rich's where that is installed, else as text with the same cells."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(report)
        return
    head, *body = report.rows()
    table = Table()
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in body:
        table.add_row(*line)
    console = Console(highlight=False)
    # In a file or a pipe, rich takes a width of 80, and would cut the numbers off.
    console.width = max(console.width, 120)
    console.print(report.title, soft_wrap=True)
    console.print(table)


def _device(name: str) -> torch.device:
    """Returns a device that is there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device got {name!r}: {str(error).partition(chr(10))[0]}") from error
    return device
