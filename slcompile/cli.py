"""The command line: ``slcompile diff``, ``slcompile export``, ``slcompile memory``, ``slcompile rates``."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slcompile import cost, memory
from slcompile.config import LOWERINGS, SUPPORTS, SLConfig, did_you_mean
from slcompile.export.checkpoint import load_factorized
from slcompile.export.files import writable_file, write_text
from slcompile.export.onnx import export_onnx
from slcompile.export.safetensors import save_merged
from slcompile.export.twin import arguments_for
from slcompile.inspect.explain import explain
from slcompile.inspect.explanation import Explanation
from slcompile.inspect.export_diff import export_diff
from slcompile.inspect.graph_diff import GraphDiff
from slcompile.inspect.onnx_graph import onnx_diff
from slcompile.measure import measure_rates

log = logging.getLogger("slcompile")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; errors that a user can mend are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="slcompile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="merge a factorized checkpoint to dense: ONNX, or safetensors for transformers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    export.add_argument("checkpoint", type=Path, help="directory of save_factorized, or of the paper's code")
    export.add_argument("--onnx", type=Path, metavar="FILE", help="write this ONNX file")
    export.add_argument("--merged", type=Path, metavar="DIR", help="write safetensors and config.json here")
    export.add_argument("--dtype", choices=DTYPES, help="of the weights; the checkpoint's own by default")
    export.add_argument("--opset", type=int, help="ONNX operator set; torch's default if not given")
    export.add_argument("--shard-size", type=int, metavar="BYTES", help="most bytes in one file of weights")
    export.add_argument("--compact", action="store_true", help="keep the factors in the ONNX file")
    export.add_argument("--no-verify", action="store_true", help="do not run and re-read the ONNX file")
    diff = commands.add_parser(
        "diff",
        help="explain what backend='sltrain' does to a model, or compare it with its ONNX file, or two ONNX files",
        description="slcompile diff PACKAGE.MODULE:FACTORY [MODEL.onnx] | --hf CONFIG.json [MODEL.onnx] | "
        "BEFORE.onnx AFTER.onnx",
    )
    diff.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="PACKAGE.MODULE:FACTORY, a function that returns a model and its example arguments: (model, args) or "
        "(model, args, kwargs); an ONNX file that was exported from the model; or two ONNX files",
    )
    diff.add_argument("--hf", type=Path, metavar="CONFIG", help="config.json of a transformers model")
    diff.add_argument(
        "--shape", default="8x256", metavar="BATCHxLENGTH", help="of the example input of --hf (default: 8x256)"
    )
    diff.add_argument(
        "--config", nargs="+", default=[], metavar="KEY=VALUE", help="fields of SLConfig, such as rank=128"
    )
    diff.add_argument("--html", type=Path, metavar="FILE", help="write a page that a browser opens offline")
    diff.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON (docs/schema.md)")
    rates = commands.add_parser(
        "rates",
        help="the device's rates, by which the lowering of each matmul is chosen",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rates.add_argument("--device", default="cpu", help="cpu or cuda")
    rates.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    rates.add_argument("--measure", action="store_true", help="measure and store them for later compiles")
    _add_memory(commands)
    args = parser.parse_args(argv)
    if args.command == "export" and args.onnx is None and args.merged is None:
        export.error("give --onnx FILE, --merged DIR, or both")
    try:
        {"diff": _diff, "export": _export, "memory": _memory, "rates": _rates}[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"slcompile: {error}", file=sys.stderr)
        return 2
    return 0


def _diff(args: argparse.Namespace) -> None:
    for path in (args.html, args.json):
        if path is not None:
            writable_file(path)  # before the work, not after it
    models = [each for each in args.what if not each.endswith(".onnx")] + [str(args.hf)] * (args.hf is not None)
    files = [each for each in args.what if each.endswith(".onnx")]
    if args.config and files:
        raise ValueError("--config is of what replaces weights; ONNX files are compared as they are")
    result: Explanation | GraphDiff
    if (len(models), len(files)) == (0, 2):
        result = onnx_diff(*files)
    elif len(models) == 1 and len(files) <= 1:
        config = _sl_config(args.config)
        model, inputs, kwargs = _from_hf(args.hf, args.shape) if args.hf is not None else _from_factory(models[0])
        with _errors_of(f"tracing {models[0]}"):
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


def _sl_config(settings: list[str]) -> SLConfig:
    """The config that ``key=value`` words give; values are Python literals, or text."""
    options: dict[str, Any] = {}
    for each in settings:
        key, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"--config takes KEY=VALUE, got {each!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    config, inductor = SLConfig.from_options(options)
    if inductor:
        raise ValueError("--config takes fields of SLConfig; Inductor's settings do not count, nothing is compiled")
    return config


@contextmanager
def _errors_of(doing: str) -> Iterator[None]:
    """Makes an error of the user's code one line that says where it comes from."""
    try:
        yield
    except Exception as error:
        log.debug("%s failed", doing, exc_info=True)
        # What is raised while Dynamo traces comes wrapped in errors of Dynamo's that say less.
        cause: BaseException = getattr(error, "inner_exception", error)
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        message = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
        raise ValueError(f"{doing} failed with {message} (TORCH_LOGS=+slcompile shows the traceback)") from error


def _from_factory(name: str) -> tuple[nn.Module, Sequence[Any], Mapping[str, Any]]:
    """The model and arguments that ``package.module:factory`` returns; modules in the current directory are found."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"a model is given as PACKAGE.MODULE:FACTORY, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _errors_of(f"importing {module_name}"):
        module = importlib.import_module(module_name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(f"{module_name} has no function {attribute!r}{did_you_mean(attribute, functions)}")
    with _errors_of(f"the factory {name}"):
        made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    model, inputs, kwargs = (*parts, *(None, (), {})[len(parts) :])[:3]
    is_model = isinstance(model, nn.Module) and len(parts) <= 3
    if not (is_model and isinstance(inputs, (tuple, list)) and isinstance(kwargs, Mapping)):
        raise ValueError(f"the factory {name} must return (model, args) or (model, args, kwargs), got {made!r:.200}")
    return model, inputs, kwargs


def _from_hf(path: Path, shape: str) -> tuple[nn.Module, Sequence[Any], Mapping[str, Any]]:
    """The transformers model of a config, on the meta device, and an example input for it."""
    if not path.is_file():
        raise ValueError(f"--hf must be a config.json, got {path}, which is no file")
    config = memory.hf_config(path)
    import transformers  # an extra; without it there is no config

    sizes = shape.split("x")
    if len(sizes) != 2 or not all(each.isdigit() and int(each) > 0 for each in sizes):
        raise ValueError(f"--shape must be BATCHxLENGTH, such as 8x256, got {shape!r}")
    with _errors_of(f"building the model of {path}"):
        kinds = [getattr(transformers, each, None) for each in config.architectures or ()]
        with torch.device("meta"):
            if kinds and kinds[0] is not None:
                model = kinds[0](config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    if isinstance(config.dtype, torch.dtype):
        model.to(config.dtype)
    kwargs, _ = example_inputs(model, *map(int, sizes))
    return model, (), arguments_for(model, kwargs)


def _export(args: argparse.Namespace) -> None:
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


def _rates(args: argparse.Namespace) -> None:
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu, or cuda where there is a GPU, got {args.device}")
    if args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.measure:
        found, path = measure_rates(device)
        print(f"measured, stored in {path}")
    else:
        found = cost.rates(device)
        stored = cost.stored_rates(device)
        print(f"from {stored}" if stored else "defaults of the device's class; --measure measures them")
    for kind, by_dtype in (("dense matmul", found.matmul), ("sparse matmul", found.sparse)):
        print(f"{kind:14} " + ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in by_dtype.items()) + "  GFLOP/s")
    print(f"{'memory':14} {found.memory / 1e9:.4g}  GB/s")
    print(f"{'positions':14} {found.entries / 1e6:.4g}  million/s")


def _show_progress(done: int, total: int) -> None:
    print(f"\rwriting weights: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def example_inputs(model: nn.Module, batch: int = 2, length: int = 16) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Keyword arguments for a transformers model, and their dynamic axes: batch and sequence, for text."""
    config: Any = model.config
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        image = torch.rand(batch, config.num_channels, size, size)
        return {"pixel_values": image}, {"pixel_values": {0: "batch_size"}}
    if main_input != "input_ids":
        raise ValueError(f"models that read {main_input} are exported from Python: slcompile.export_onnx(model, ...)")
    ids = torch.arange(batch * length).reshape(batch, length) % config.get_text_config().vocab_size
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    axes = {0: "batch_size", 1: "sequence_length"}
    shapes: dict[str, Any] = dict.fromkeys(inputs, axes)
    if hasattr(config, "use_cache"):
        inputs["use_cache"], shapes["use_cache"] = False, None
    return inputs, shapes


def _add_memory(commands: Any) -> None:
    parser = commands.add_parser(
        "memory",
        help="what training a model takes, without the GPU and without the weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=memory.LLAMAS, help="one of the paper's models")
    which.add_argument("--hf", type=Path, metavar="CONFIG.json", help="configuration of a causal language model")
    which.add_argument(
        "factory", nargs="?", metavar="PACKAGE.MODULE:FACTORY", help="returns (model, args) or (model, args, kwargs)"
    )
    defaults = SLConfig()
    parser.add_argument("--rank", type=_rank, default=defaults.rank, help="an int, or a fraction of min(rows, columns)")
    parser.add_argument("--density", type=float, default=defaults.density, help="share of non-zeros")
    parser.add_argument("--support", choices=SUPPORTS, default=defaults.support, help="of the non-zeros")
    parser.add_argument("--lowering", choices=LOWERINGS, default=defaults.lowering, help="of matmuls")
    parser.add_argument("--optimizer", choices=memory.OPTIMIZERS, default="adamw", help="whose state is counted")
    parser.add_argument("--per-layer", action="store_true", help="update parameters in the backward pass")
    parser.add_argument("--compiled", choices=memory.COMPILED, help="default: layers with --per-layer, else model")
    parser.add_argument("--batch", type=int, help="sequences a step, 1 if not given; a factory gives its own arguments")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence, 256 if not given; likewise")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights; bfloat16 if not given, and a factory's own")
    parser.add_argument("--device", choices=memory.DEVICES, default="cuda", help="whose kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here, .png or .svg")


def _rank(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _memory(args: argparse.Namespace) -> None:
    for name in ("batch", "seq_len"):
        size = getattr(args, name)
        if size is not None and (size < 1 or args.factory):
            allowed = "left out with a factory, which gives its own arguments" if args.factory else "at least 1"
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {size}")
    json_file = None if args.json is None else writable_file(args.json)
    if args.plot is not None:
        from slcompile.plot import plot_file, plot_memory  # matplotlib is an extra

        plot_file(args.plot)
    config = SLConfig(rank=args.rank, density=args.density, support=args.support, lowering=args.lowering)
    if args.factory:
        title = args.factory
        source, inputs, kwargs = _from_factory(args.factory)
    else:
        batch, length = args.batch or 1, args.seq_len or 256
        title = f"{args.model or args.hf}, batch {batch} x {length} tokens"
        source = memory.hf_config(args.hf) if args.model is None else memory.llama_config(args.model)
        ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
        inputs, kwargs = (), {"input_ids": ids, "labels": ids}
    with _errors_of(f"estimating {title}"):
        report = memory.estimate_memory(
            source,
            inputs,
            kwargs,
            config=config,
            optimizer=args.optimizer,
            per_layer=args.per_layer,
            dtype=DTYPES.get(args.dtype) or (None if args.factory else torch.bfloat16),
            device=args.device,
            compiled=args.compiled,
        )
    print(title)
    print(report)
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_dict(), indent=1) + "\n")
    if args.plot is not None:
        print(f"chart in {plot_memory(report, args.plot)}")
