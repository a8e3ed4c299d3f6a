"""PEFT's LoRA files: what is added to a frozen base without a sparse part is read from and written to them.

``adapter_config.json`` beside ``adapter_model.safetensors``, which holds ``base_model.model.<module>.lora_A.weight``
[rank, in] and ``lora_B.weight`` [out, rank] for each module; the weight is ``W0 + alpha / rank * lora_B @ lora_A``.
A weight that is stored [in, out] has them transposed here: ``B = lora_A^T`` and ``A = lora_B^T``. Of a convolution
[out, in, *kernel] they are convolutions themselves, [rank, in, *kernel] and [out, rank, 1, ...].
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import files
from slcompile.config import SLConfig, did_you_mean
from slcompile.convert.candidates import Candidate, gather
from slcompile.convert.ledger import ledger
from slcompile.convert.transaction import convert
from slcompile.convert.weight_uses import weight_modules
from slcompile.export.checkpoint import read_settings, read_tensors
from slcompile.export.safetensors import INSTALL
from slcompile.export.twin import require_finite
from slcompile.factorize import named_weights
from slcompile.models import bare, unwrapped
from slcompile.names import plain_name
from slcompile.passes import PassReport
from slcompile.passes.find_matmuls import WeightUse
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import base_class
from slcompile.weight.sl_weight import SLWeight
from slcompile.weight.structure import FactorizedWeight, weights_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Each changes what the adapter computes, or adds parts to it that a weight W0 + s B A has no place for.
UNSUPPORTED = (
    "use_dora lora_bias modules_to_save trainable_token_indices target_parameters layer_replication megatron_config "
    "alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config velora_config"
).split()

OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of LoRA, or what their names begin with, that leave something else than W0 beside the factors."""


def save_peft(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes what was added to a model's frozen weights as a LoRA adapter of PEFT; returns the directory.

    ``peft.PeftModel.from_pretrained(dense_model, directory)`` then computes what the model does. Other trained
    parameters (a head, biases) are not in these files.

    Args:
        model: Factorized with a base and ``density=0``; left as it is. Of a packed base, the adapter is one for the
            weights as they are packed.
        directory: Made if it does not exist. A kill leaves the old adapter in it, the new one, or an
            ``adapter_config.json`` that is no JSON, so that the directory is refused.

    Raises:
        ValueError: The model has no factorized weight, or one that these files cannot hold: without a base, with a
            sparse part, a stack of matrices, of several layers, or not of ``nn.Linear``, transformers' ``Conv1D`` or a
            convolution layer; or a parameter holds NaN or Inf or is on the meta device.
        RuntimeError: The factors are sharded.
        ImportError: safetensors is missing.
    """
    save_file = _safetensors("save_file")
    model = bare(model)
    weights = dict(named_weights(model))
    if not weights:
        raise ValueError(f"model must have factorized weights, got {type(model).__name__} without one")
    require_finite(model)
    holders = Counter(map(id, weights.values()))
    if shared := [name for name, each in weights.items() if holders[id(each)] > 1]:
        raise ValueError(f"{', '.join(shared)} are one weight, and these files adapt each layer by itself")
    state: dict[str, Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}
    layers = {path for path, _, use in weight_modules(model) if use.matmuls}
    for name, weight in weights.items():
        module, _, attribute = name.rpartition(".")
        if not isinstance(weight, SLWeight) or not weight.has_base or weight.nonzeros:
            raise ValueError(f"{name} must be factorized with base='frozen' and density=0 for PEFT, got {weight}")
        if module not in layers or attribute != "weight" or len(weight.shape) != 2:
            raise ValueError(
                f"{name} is no weight of nn.Linear, Conv1D or a convolution layer, of which alone PEFT's LoRA is"
            )
        weight.check_whole()
        reading, writing = (weight.A, weight.B) if weight.input_dim == 1 else (weight.B.t(), weight.A.t())
        if weight.convolved:
            _, *patch = weight.stored_shape
            reading, writing = reading.unflatten(1, patch), writing[(...,) + (None,) * (len(patch) - 1)]
        state[f"{PREFIX}{module}.lora_A.weight"] = reading.detach().cpu().contiguous()
        state[f"{PREFIX}{module}.lora_B.weight"] = writing.detach().cpu().contiguous()
        settings[module] = weight.rank, weight.scale * weight.rank
    directory = files.writable_directory(directory)
    with files.inside(directory) as scratch:
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(_config(model, settings, weights), indent=2))
        files.move_over(scratch, directory, last=CONFIG, stale={"adapter_model.bin"})
    return directory


def _config(
    model: nn.Module, settings: Mapping[str, tuple[int, float]], weights: Mapping[str, FactorizedWeight]
) -> dict[str, Any]:
    """Returns what ``adapter_config.json`` holds, from the rank and alpha of each module."""
    rank = Counter(rank for rank, _ in settings.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in settings.values()).most_common(1)[0][0]
    others = {plain_name(path) for path, module in model.named_modules() if path} - settings.keys()
    # PEFT takes a listed name for the end of one.
    is_plain = not any(other.endswith(f".{name}") for name in settings for other in others)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_end(name): each for name, (each, _) in settings.items() if each != rank},
        "alpha_pattern": {_end(name): each for name, (_, each) in settings.items() if each != alpha},
        "target_modules": sorted(settings) if is_plain else "|".join(map(re.escape, sorted(settings))),
        "fan_in_fan_out": any(each.input_dim == 0 for each in weights.values()),
    }


def _end(name: str) -> str:
    return f"^{re.escape(name)}"  # the whole name, not the end of one


def load_peft(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Adds a LoRA adapter of PEFT to a dense model, in place, as factors beside its frozen weights.

    The model then is as after ``factorize_`` with ``base="frozen"`` and ``density=0``, with the ranks and scales of the
    file: it trains on, exports merged, and ``save_peft`` writes it again. The factors are of the weights' dtype.
    Dropout of the adapter is a setting of training there and is not read.

    Args:
        model: Dense, the one that the adapter was trained for.
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The model.

    Raises:
        ValueError: There is no such adapter, it is of another model, it holds NaN, Inf or integers, or is of a kind
            that is no plain LoRA (DoRA, biases, other modules saved with it, a start that changed the weights, such
            as PiSSA's): the message names it. The model is then as it was.
        ImportError: safetensors is missing.
    """
    _safetensors("load_file")
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} must hold {CONFIG} and {WEIGHTS}, has no {name}")
    settings = read_settings(directory / CONFIG, ("peft_type",))
    _require_plain_lora(settings)
    pairs = _pairs(read_tensors(directory / WEIGHTS))
    model = unwrapped(model)
    if weights_in(model):
        raise ValueError("model must be dense, got one that is factorized; load the adapter into the model before")
    with ledger.lock:
        live = LiveObjects.find()
        names = tuple(f"{glob.escape(name)}.weight" for name in pairs)
        config = SLConfig(base="frozen", density=0, include=names, exclude=(), min_dim=1, rank=1)
        candidates = _candidates(model, pairs, settings, config, live)
        report = PassReport("weights", [each.decision for each in candidates])
        weights = convert(candidates, config, live, report, ledger)
    for candidate, weight in zip(candidates, weights, strict=True):
        assert isinstance(weight, SLWeight)
        reading, writing = (each.flatten(1) for each in pairs[candidate.name.removesuffix(".weight")])
        B, A = (writing, reading) if candidate.input_dim == 1 else (reading.t(), writing.t())
        weight.set_factors(B, A, torch.empty_like(weight.values))
    ledger.note_explicit(model, config)
    return model


def _require_plain_lora(settings: Mapping[str, Any]) -> None:
    kind = settings["peft_type"]
    if kind != "LORA":
        raise ValueError(f"{CONFIG} must have peft_type 'LORA', got {kind!r}")
    for name in UNSUPPORTED:
        if settings.get(name):
            raise ValueError(f"the adapter has {name}={settings[name]!r}, which is no plain LoRA: W0 + s B A")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_WEIGHTS):
        raise ValueError(
            f"the adapter has init_lora_weights={start!r}, which changed the weights that it is added to: only what is "
            "added to W0 can be read (peft's save_pretrained converts, with path_initial_model_for_weight_conversion)"
        )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"the adapter has bias={settings['bias']!r}: biases were trained with it, which are not read")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), (int, float)):
            raise ValueError(f"{CONFIG}: {name} must be a number, got {settings.get(name)!r:.100}")


def _pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the name of each module -> its lora_A and lora_B.

    Raises:
        ValueError: A tensor is none of these, lacks the other, or has values that are no finite numbers.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        matched = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not matched:
            raise ValueError(f"{WEIGHTS} holds {key!r}, which is no factor of a linear layer")
        if not tensor.is_floating_point():
            raise ValueError(f"{WEIGHTS}: {key} must be floating-point, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor.double()).all()):  # isfinite takes no dtypes of 8 bits
            raise ValueError(f"{WEIGHTS}: {key} contains NaN or Inf")
        found.setdefault(matched[1], {})[matched[2]] = tensor
    if not found:
        raise ValueError(f"{WEIGHTS} holds no factors")
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{WEIGHTS} holds only lora_{next(iter(pair))} of {name}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _candidates(
    model: nn.Module,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    settings: Mapping[str, Any],
    config: SLConfig,
    live: LiveObjects,
) -> list[Candidate]:
    """Returns the weights that an adapter is of, each with its rank and alpha.

    Raises:
        ValueError: They are not those of this model.
    """
    layers = {path: (module, use) for path, module, use in weight_modules(model) if use.matmuls}
    uses: list[tuple[nn.Parameter, WeightUse]] = []
    for name, (A, B) in pairs.items():
        if name not in layers:
            raise ValueError(
                f"the adapter is of another model: it is of {name}, which is no layer of this "
                f"{base_class(model).__name__} with a matrix{did_you_mean(name, layers)}"
            )
        module, use = layers[name]
        weight = module._parameters["weight"]
        assert weight is not None
        outputs, *inputs = weight.shape if use.input_dim == 1 else weight.shape[::-1]
        if list(A.shape[1:]) != inputs or list(B.shape) != [outputs, len(A), *[1] * (len(inputs) - 1)]:
            raise ValueError(
                f"the adapter is of another model: of {name}, {[outputs, *inputs]}, it has lora_A {list(A.shape)} and "
                f"lora_B {list(B.shape)}"
            )
        if any(weight is other for other, _ in uses):
            raise ValueError(f"the adapter of {name} has no place here: its weight is that of another layer, too")
        uses.append((weight, use))
    found = gather(uses, config, live, model=model).weights
    for name, each in zip(pairs, found, strict=True):
        # Whether it is smaller than the weight was decided by whoever trained it.
        if each.decision.reason not in ("", "no_saving"):
            raise ValueError(f"the adapter of {name} has no place here: {each.decision.detail}")
        each.decision = replace(each.decision, reason="", detail="")
        rank = len(pairs[name][0])
        if rank != (expected := _setting(settings, "rank_pattern", "r", name)):
            raise ValueError(f"{CONFIG} gives {name} the rank {expected}, {WEIGHTS} has {rank}")
        alpha = _setting(settings, "alpha_pattern", "lora_alpha", name)
        # Of rank-stabilised LoRA the scale is alpha / sqrt(rank).
        each.config = replace(config, rank=rank, alpha=alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)
    return found


def _setting(settings: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    """Returns what PEFT takes for a module: the value of the first pattern that is its name, or the end of it."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return settings[default]


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"PEFT's files need {error.name}: {INSTALL}") from error
    return getattr(safetensors.torch, name)
