"""``slcompile check``: whether what is compiled computes what eager mode does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from slcompile.cli.sources import add_factory, errors_of, from_factory, sl_config
from slcompile.files import writable_file, write_text
from slcompile.health import check


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="compare compiled training and inference of a model with eager mode; exit code 1 where they differ",
    )
    add_factory(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where something is wrong."""
    if args.json is not None:
        writable_file(args.json)  # before the work, not after it
    config = sl_config(args.config)
    model, inputs, kwargs = from_factory(args.factory)
    with errors_of(f"checking {args.factory}"):
        report = check(model, inputs, kwargs, config=config)
    print(report)
    if args.json is not None:
        write_text(args.json, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0 if report.is_healthy else 1
