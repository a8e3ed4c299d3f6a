"""``slcompile suggest``: a rank for each weight of a trained model, under one budget of parameters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from slcompile.cli.sources import add_factory, errors_of, from_factory, sl_config
from slcompile.files import writable_file, write_text
from slcompile.inspect.suggest import suggest


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "suggest", help="distribute rank over a trained model's weights, under one budget of parameters"
    )
    add_factory(parser, "density=0.05")
    parser.add_argument("--budget", type=float, required=True, help="take this share of the weights' parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ranks here, as the option rank takes them")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.json is not None:
        writable_file(args.json)  # before the work, not after it
    if any(each.partition("=")[0] == "rank" for each in args.config):
        raise ValueError("--config must leave rank out here: it is what is suggested")
    config = sl_config(args.config)
    model, inputs, kwargs = from_factory(args.factory)
    has_call = bool(inputs) or bool(kwargs)
    with errors_of(f"looking at the weights of {args.factory}"):
        found = suggest(
            model,
            args.budget,
            config,
            example_args=inputs if has_call else None,
            example_kwargs=kwargs if has_call else None,
        )
    print(found)
    if args.json is not None:
        print(f"wrote {write_text(args.json, json.dumps(found.rank, indent=1) + chr(10))}")
