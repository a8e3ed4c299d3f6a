"""``slcompile memory``: what training a model takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from slcompile.cli.sources import DTYPES, errors_of, from_factory, literals
from slcompile.config import BASES, LOWERINGS, SAVES, STRUCTURES, SUPPORTS, SLConfig
from slcompile.files import writable_file, write_text
from slcompile.memory.estimate import COMPILED, DEVICES, estimate_memory
from slcompile.memory.many import ManyReport, estimate_many
from slcompile.memory.optimizer_bytes import OPTIMIZERS
from slcompile.memory.report import MemoryReport
from slcompile.memory.sharding import Layout
from slcompile.models import KNOWN, hf_config, known_config


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "memory",
        help="estimate what training a model takes, without the GPU and without the weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model", choices=KNOWN, help="estimate a known model: the paper's, Llama 3, a mixture of experts"
    )
    which.add_argument(
        "--hf", type=Path, metavar="CONFIG.json", help="estimate this configuration of a causal language model"
    )
    which.add_argument(
        "factory",
        nargs="?",
        metavar="PACKAGE.MODULE:FACTORY",
        help="call this function, which returns (model, args) or (model, args, kwargs)",
    )
    defaults = SLConfig()
    parser.add_argument(
        "--rank",
        type=_rank,
        default=defaults.rank,
        help="give the factors this rank: an int, or a fraction of min(rows, columns)",
    )
    parser.add_argument("--density", type=float, default=defaults.density, help="give S this share of non-zeros")
    parser.add_argument("--support", choices=SUPPORTS, default=defaults.support, help="place the non-zeros so")
    parser.add_argument("--vector", type=int, default=defaults.vector, help="let so many rows share their columns")
    parser.add_argument(
        "--structure", choices=STRUCTURES, default=defaults.structure, help="put this in a weight's place"
    )
    parser.add_argument("--blocks", type=int, help="cut weights into so many blocks or heads, where a structure does")
    parser.add_argument("--base", choices=BASES, help="keep the weights, frozen, and train what is added")
    parser.add_argument("--save", choices=SAVES, default=defaults.save, help="save so much of factored matmuls")
    parser.add_argument(
        "--memory-budget", metavar="BYTES", help="fit the step into this, such as 6GB, with --save auto"
    )
    parser.add_argument("--lowering", choices=LOWERINGS, default=defaults.lowering, help="run matmuls so")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="count the state of this optimizer")
    parser.add_argument("--per-layer", action="store_true", help="update parameters in the backward pass")
    parser.add_argument(
        "--compiled",
        choices=COMPILED,
        help="compile the whole model (the default), or each layer by itself (with --per-layer)",
    )
    parser.add_argument(
        "--batch",
        "--micro-batch",
        type=int,
        help="train on so many sequences a step, 1 if not given; a factory gives its own arguments",
    )
    parser.add_argument("--seq-len", type=int, help="train on so many tokens a sequence, 256 if not given; likewise")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="hold weights in this dtype; bfloat16 if not given, and a factory's own"
    )
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="count the kernels of this device")
    parser.add_argument("--gpus", type=int, help="spread the model over so many, and estimate each")
    parser.add_argument("--fsdp", action="store_true", help="shard by FSDP2 on --gpus; they use DDP if not given")
    parser.add_argument("--tp", type=int, help="let so many of --gpus share each matmul, 1 if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here, .png or .svg")
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    for name in ("batch", "seq_len"):
        size = getattr(args, name)
        if size is not None and (size < 1 or args.factory):
            allowed = "left out with a factory, which gives its own arguments" if args.factory else "at least 1"
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {size}")
    if args.gpus is None and (args.fsdp or args.tp is not None):
        raise ValueError(f"--{'fsdp' if args.fsdp else 'tp'} needs --gpus")
    for flag in ("plot", "compiled", "memory_budget"):
        if args.gpus is not None and getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} is for one GPU, got --gpus {args.gpus}")
    layout = None if args.gpus is None else Layout(args.gpus, args.fsdp, 1 if args.tp is None else args.tp)
    json_file = None if args.json is None else writable_file(args.json)
    if args.plot is not None:
        from slcompile.files import plot_file
        from slcompile.memory.chart import plot_memory

        if plot_file(args.plot).resolve() == (json_file and json_file.resolve()):
            raise ValueError(f"--plot and --json must be two files, got {args.plot} for both")
    names = ("rank", "density", "support", "vector", "structure", "blocks", "base", "lowering", "save", "memory_budget")
    config = SLConfig(**{name: getattr(args, name) for name in names})
    if args.factory:
        title = args.factory
        source, inputs, kwargs = from_factory(args.factory)
    else:
        batch, length = args.batch or 1, args.seq_len or 256
        title = f"{args.model or args.hf}, batch {batch} x {length} tokens{' on each GPU' if layout else ''}"
        source = hf_config(args.hf) if args.model is None else known_config(args.model)
        ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
        inputs, kwargs = (), {"input_ids": ids, "labels": ids}
    common: dict[str, Any] = {
        "config": config,
        "optimizer": args.optimizer,
        "per_layer": args.per_layer,
        "dtype": DTYPES.get(args.dtype) or (None if args.factory else torch.bfloat16),
        "device": args.device,
    }
    report: ManyReport | MemoryReport
    with errors_of(f"estimating {title}"):
        if layout is not None:
            (report,) = estimate_many(source, inputs, kwargs, layouts=[layout], **common)
        else:
            report = estimate_memory(source, inputs, kwargs, compiled=args.compiled, **common)
    print(title)
    print(report)
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_dict(), indent=1) + "\n")
    if args.plot is not None and isinstance(report, MemoryReport):
        print(f"chart in {plot_memory(report, args.plot)}")


def _rank(text: str) -> Any:
    """Returns an int or a float where the text reads as one; SLConfig refuses what is none."""
    return literals("--rank", [f"rank={text}"])["rank"]
