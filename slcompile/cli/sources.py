"""Models, configurations and options that are named on the command line."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slcompile.config import SLConfig, did_you_mean
from slcompile.models import arguments_for, hf_config

log = logging.getLogger("slcompile")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_factory(parser: argparse.ArgumentParser, example: str = "rank=128") -> None:
    """Adds the arguments that say which model, and which options; ``from_factory`` and ``sl_config`` read them."""
    parser.add_argument(
        "factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="call this function, which returns (model, args) or (model, args, kwargs)",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"set fields of SLConfig, such as {example}",
    )


def sl_config(settings: list[str]) -> SLConfig:
    """Returns the config that ``key=value`` words give; values are Python literals, or text."""
    config, inductor = SLConfig.from_options(literals("--config", settings))
    if inductor:
        raise ValueError("--config takes fields of SLConfig, and Inductor's settings are none")
    return config


def literals(flag: str, settings: list[str]) -> dict[str, Any]:
    """Returns what the ``key=value`` words of a flag say; values are Python literals, or text."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{flag} takes KEY=VALUE, got {setting!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval says it raises
            found[key] = value
    return found


@contextmanager
def errors_of(doing: str) -> Iterator[None]:
    """Makes an error of the user's code one line that says where it comes from."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(f"{doing} ended the process with sys.exit({error.code!r})") from error
    except Exception as error:
        log.debug("%s failed", doing, exc_info=True)
        # What is raised while Dynamo traces comes wrapped in errors of Dynamo's that say less.
        cause: BaseException = error
        while type(cause).__module__.startswith("torch._"):
            inner = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
            if inner is None:
                break
            cause = inner
        message = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
        raise ValueError(f"{doing} failed with {message} (TORCH_LOGS=+slcompile shows the traceback)") from error


def from_factory(name: str) -> tuple[nn.Module, Sequence[Any], Mapping[str, Any]]:
    """Calls ``package.module:factory``, also of the current directory; returns its model and arguments."""
    factory = from_module(name, "a model is given as PACKAGE.MODULE:FACTORY")
    with errors_of(f"the factory {name}"):
        made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    model, inputs, kwargs = (*parts, *(None, (), {})[len(parts) :])[:3]
    is_model = isinstance(model, nn.Module) and len(parts) <= 3
    if not (is_model and isinstance(inputs, (tuple, list)) and isinstance(kwargs, Mapping)):
        got = " ".join(f"{made!r:.200}".split())
        raise ValueError(f"the factory {name} must return (model, args) or (model, args, kwargs), got {got}")
    return model, inputs, kwargs


def from_module(name: str, how: str) -> Callable[..., Any]:
    """Returns the function ``package.module:function``, also of the current directory; ``how`` is for an error."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{how}, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with errors_of(f"importing {module_name}"):
        module = importlib.import_module(module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(f"{module_name} has no function {attribute!r}{did_you_mean(attribute, functions)}")
    return found


def from_hf(path: Path, shape: str) -> tuple[nn.Module, Sequence[Any], Mapping[str, Any]]:
    """Returns the transformers model of a config, on the meta device, and an example input for it."""
    if not path.is_file():
        raise ValueError(f"--hf must be a config.json, got {path}, which is no file")
    config = hf_config(path)
    import transformers  # an extra; without it there is no config

    sizes = shape.split("x")
    if len(sizes) != 2 or not all(each.isdigit() and int(each) > 0 for each in sizes):
        raise ValueError(f"--shape must be BATCHxLENGTH, such as 8x256, got {shape!r}")
    with errors_of(f"building the model of {path}"):
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


def example_inputs(model: nn.Module, batch: int = 2, length: int = 16) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns keyword arguments for a transformers model, and their dynamic axes: batch and sequence, for text."""
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
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"], shapes["use_cache"] = False, None
    return inputs, shapes
