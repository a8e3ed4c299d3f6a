"""``slcompile diff``: what the backend does to a model, or how two models differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slcompile.cli.sources import errors_of, from_factory, from_hf, sl_config
from slcompile.files import writable_file
from slcompile.inspect.explain import explain
from slcompile.inspect.explanation import Explanation
from slcompile.inspect.export_diff import export_diff
from slcompile.inspect.graph_diff import GraphDiff
from slcompile.inspect.onnx_graph import onnx_diff


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="explain what backend='sltrain' does to a model, or compare it with its ONNX file, or two ONNX files",
        description="slcompile diff PACKAGE.MODULE:FACTORY [MODEL.onnx] | --hf CONFIG.json [MODEL.onnx] | "
        "BEFORE.onnx AFTER.onnx",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="PACKAGE.MODULE:FACTORY, a function that returns a model and its example arguments: (model, args) or "
        "(model, args, kwargs); an ONNX file that was exported from the model; or two ONNX files",
    )
    parser.add_argument("--hf", type=Path, metavar="CONFIG", help="explain the transformers model of this config.json")
    parser.add_argument("--shape", metavar="BATCHxLENGTH", help="shape the example input of --hf so (default: 8x256)")
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="set fields of SLConfig, such as rank=128",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that a browser opens offline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    for path in (args.html, args.json):
        if path is not None:
            writable_file(path)  # before the work, not after it
    if args.html is not None and args.json is not None and args.html.resolve() == args.json.resolve():
        raise ValueError(f"--html and --json must be two files, got {args.html} for both")
    if args.shape is not None and args.hf is None:
        raise ValueError(f"--shape is of --hf, got {args.shape!r} without it: a factory gives its own arguments")
    models = [each for each in args.what if not each.endswith(".onnx")] + [str(args.hf)] * (args.hf is not None)
    files = [each for each in args.what if each.endswith(".onnx")]
    if args.config and files:
        raise ValueError("--config is of what replaces weights; ONNX files are compared as they are")
    missing = [each for each in files if not Path(each).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is no file")
    result: Explanation | GraphDiff
    if (len(models), len(files)) == (0, 2):
        result = onnx_diff(*files)
    elif len(models) == 1 and len(files) <= 1:
        config = sl_config(args.config)
        model, inputs, kwargs = (
            from_hf(args.hf, args.shape or "8x256") if args.hf is not None else from_factory(models[0])
        )
        with errors_of(f"tracing {models[0]}"):
            found = explain(model, inputs, kwargs, config)
        result = export_diff(model, found, files[0]) if files else found
    else:
        raise ValueError(
            "give PACKAGE.MODULE:FACTORY or --hf CONFIG.json, perhaps with an ONNX file, or two ONNX files"
        )
    print(result)
    if args.json is not None:
        print(f"wrote {result.to_json(args.json)}")
    if args.html is not None:
        print(f"wrote {result.to_html(args.html)}")
