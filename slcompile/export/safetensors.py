"""Merged dense weights for PyTorch deployments: safetensors that ``from_pretrained`` loads as an ordinary model."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import files
from slcompile.config import require_int
from slcompile.export.twin import dense_tensors, export_dtype, floating_dtype, meta_twin, require_finite
from slcompile.models import bare, forget_factors
from slcompile.weight.placing import base_class

INSTALL = 'pip install "slcompile[safetensors]"'
CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shard_size: int = 2 * 2**30,
) -> Path:
    """Writes a model's weights, merged to dense under their original names, as safetensors.

    One file is in memory at a time. With ``config.json`` (and ``generation_config.json``) beside them, for a
    transformers model, ``from_pretrained(directory)`` gives an ordinary dense model. A tied weight is stored once.

    Files are written in a hidden directory in it, and moved. A kill leaves the old model, the new one, or a directory
    that is refused, since its ``config.json`` (of a model that is not of transformers: the index) is no JSON.

    Args:
        model: Left as it is.
        directory: Made if it does not exist. Of an older model in it, the weights in safetensors that
            ``from_pretrained`` would read, ``generation_config.json`` and ``slcompile.json`` are removed; other files
            are left alone.
        dtype: float32, float64, float16 or bfloat16; None keeps each tensor's own.
        shard_size: Most bytes in one file; a larger weight has one of its own.

    Returns:
        The directory.

    Raises:
        ValueError: An argument is not allowed, a weight holds NaN or Inf or is on the meta device, or the state dict
            has an entry that is no tensor.
        OSError: The disk is full, or the files cannot be written.
        ImportError: safetensors or huggingface_hub is missing.
    """
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"writing safetensors needs {error.name}: {INSTALL}") from error
    require_int("shard_size", shard_size)
    directory = files.writable_directory(directory)
    model = bare(model)
    require_finite(model)
    twin = meta_twin(model, None if dtype is None else export_dtype(model, dtype))
    tensors = dense_tensors(model, twin)
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(twin.state_dict(keep_vars=True).items())}
    state = dict(reversed(list(unique.values())))  # of names for one tensor, the first
    for name, each in state.items():
        if not isinstance(each, Tensor):
            raise ValueError(f"safetensors hold tensors alone, and {name} of the state dict is a {type(each).__name__}")
    plan = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    size = sum(tensor.nbytes for tensor in state.values())
    files.require_space(directory if directory.is_dir() else directory.parent, size)
    with files.inside(directory) as scratch:
        for file, names in plan.filename_to_tensors.items():
            save_file({name: tensors[name]() for name in names}, scratch / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (scratch / INDEX).write_text(json.dumps(index, indent=2))
        last, stale = INDEX if plan.is_sharded else WEIGHTS, stale_weights(directory) | {"slcompile.json"}
        if _save_config(model, twin, scratch):
            last, stale = CONFIG, stale | {GENERATION}
        files.move_over(scratch, directory, last=last, stale=stale)
    return directory


def stale_weights(directory: Path) -> set[str]:
    """Returns the names of a model's weights in a directory, as transformers writes them, and of their index."""
    shards = {each.name for each in directory.iterdir() if _SHARD.fullmatch(each.name)}
    return shards | _indexed(directory / INDEX) | {WEIGHTS, INDEX}


def _indexed(index: Path) -> set[str]:
    """Returns the files beside an index that it names; none where it cannot be read."""
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
    return {each.name for each in index.parent.glob("*.safetensors")} & named


def _save_config(model: nn.Module, twin: nn.Module, directory: Path) -> bool:
    """Writes config.json and generation_config.json, where the model is one of transformers'; returns whether it is."""
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(directory)
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "save_pretrained"):
        return False
    forget_factors(config)
    config.architectures = [base_class(model).__name__]
    config.dtype = floating_dtype(twin)
    config.save_pretrained(directory)
    return True
