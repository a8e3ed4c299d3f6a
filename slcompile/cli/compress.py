"""``slcompile compress``: a trained model's weights as factors, written as such or merged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slcompile.cli.sources import add_factory, errors_of, from_factory, from_module, literals, sl_config
from slcompile.export.checkpoint import save_factorized
from slcompile.export.safetensors import save_merged
from slcompile.files import writable_directory
from slcompile.inspect.compress import SUPPORT, compress


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compress", help="compress a trained model's weights to factors, as its own inputs need them"
    )
    add_factory(parser, "min_dim=64")
    parser.add_argument(
        "--calibration",
        required=True,
        metavar="PACKAGE.MODULE:FUNCTION",
        help="call this function, which returns batches: mappings of keyword arguments, tuples, or single values",
    )
    parser.add_argument("--budget", type=float, help="take this share of the weights' parameters, rank distributed")
    parser.add_argument("--rank", help="or give each weight this rank: an int, a fraction, or a mapping by pattern")
    parser.add_argument("--density", help="put this share of each weight's entries into S")
    parser.add_argument(
        "--refine", action="store_true", help="fit weights once more, each behind those that are approximated"
    )
    parser.add_argument("--distill-steps", type=int, default=0, metavar="N", help="then train so many steps")
    parser.add_argument("--lr", type=float, help="train with this learning rate (default: 3e-4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the factors of a transformers model here")
    parser.add_argument("--merged", type=Path, metavar="DIR", help="write dense safetensors here")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.out is None and args.merged is None:
        raise ValueError("give --out DIR, --merged DIR, or both")
    for directory in (args.out, args.merged):
        if directory is not None:
            writable_directory(directory)  # before the work, not after it
    if args.out is not None and args.merged is not None and args.out.resolve() == args.merged.resolve():
        raise ValueError(f"--out and --merged must be two directories, got {args.out} for both")
    if args.lr is not None and not args.distill_steps:
        raise ValueError(f"--lr is of --distill-steps, got {args.lr} without steps")
    settings = [each for each in args.config if each.partition("=")[0] != "support"]
    for key in ("rank", *(["density"] if args.density else [])):
        if any(each.partition("=")[0] == key for each in args.config):
            raise ValueError(f"--config must leave {key} out: --{key}{' or --budget' * (key == 'rank')} gives it here")
    config = sl_config([*args.config, *([f"support={SUPPORT}"] if len(settings) == len(args.config) else [])])
    given = literals("--rank", [f"{key}={getattr(args, key)}" for key in ("rank", "density") if getattr(args, key)])
    model, _, _ = from_factory(args.factory)
    if args.out is not None and not hasattr(model, "save_pretrained"):
        raise ValueError(f"--out needs a model of transformers, got {type(model).__name__}: give --merged DIR")
    batches = from_module(args.calibration, "calibration batches are given as PACKAGE.MODULE:FUNCTION")
    with errors_of(f"calling {args.calibration}"):
        calibration = list(batches())
    with errors_of(f"compressing the model of {args.factory}"):
        found = compress(
            model,
            calibration,
            budget=args.budget,
            config=config,
            refine=args.refine,
            distill_steps=args.distill_steps,
            **given,
            **({} if args.lr is None else {"lr": args.lr}),
        )
    print(found)
    if args.out is not None:
        print(f"factors in {save_factorized(model, args.out)}")
    if args.merged is not None:
        print(f"merged weights in {save_merged(model, args.merged)}")
