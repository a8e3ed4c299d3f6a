"""``slcompile export``: a factorized checkpoint as dense ONNX or safetensors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slcompile.cli.sources import DTYPES, example_inputs
from slcompile.export.checkpoint import load_factorized
from slcompile.export.onnx import export_onnx
from slcompile.export.safetensors import save_merged
from slcompile.files import writable_directory, writable_file


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="merge a factorized checkpoint to dense: ONNX, or safetensors for transformers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="read this directory of save_factorized, or of the paper's code")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write this ONNX file")
    parser.add_argument("--merged", type=Path, metavar="DIR", help="write safetensors and config.json here")
    parser.add_argument("--dtype", choices=DTYPES, help="write weights in this dtype; by default the checkpoint's")
    parser.add_argument("--opset", type=int, help="use this ONNX operator set; torch's default if not given")
    parser.add_argument(
        "--shard-size", type=int, metavar="BYTES", help="write files of at most so many bytes of weights"
    )
    parser.add_argument("--compact", action="store_true", help="keep the factors in the ONNX file")
    parser.add_argument("--no-verify", action="store_true", help="do not run and re-read the ONNX file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.onnx is None and args.merged is None:
        raise ValueError("give --onnx FILE, --merged DIR, or both")
    for flag, given in (("compact", args.compact), ("opset", args.opset is not None), ("no-verify", args.no_verify)):
        if given and args.onnx is None:
            raise ValueError(f"--{flag} is of the ONNX file: give --onnx FILE, too")
    if args.onnx is not None:
        writable_file(args.onnx)  # before the work, not after it
    if args.merged is not None:
        writable_directory(args.merged)
        if args.merged.resolve() == args.checkpoint.resolve():
            raise ValueError(
                f"--merged must be another directory than the checkpoint's, got {args.merged}: no factors would be left"
            )
    model = load_factorized(args.checkpoint)
    dtype = DTYPES.get(args.dtype)
    if args.merged is not None:
        sizes = {} if args.shard_size is None else {"shard_size": args.shard_size}
        print(f"merged weights in {save_merged(model, args.merged, dtype=dtype, **sizes)}")
    if args.onnx is not None:
        kwargs, dynamic_shapes = example_inputs(model)
        report = export_onnx(
            model,
            (),
            args.onnx,
            kwargs=kwargs,
            dynamic_shapes=dynamic_shapes,
            dtype=dtype,
            opset=args.opset,
            verify=not args.no_verify,
            compact=args.compact,
            shard_size=args.shard_size,
            progress=_show_progress if sys.stderr.isatty() else None,
        )
        print(report)


def _show_progress(done: int, total: int) -> None:
    print(f"\rwriting weights: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
