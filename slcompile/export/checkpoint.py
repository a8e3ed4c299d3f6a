"""Factorized checkpoints of transformers models: our own, and those of the paper's code.

Ours is what ``model.save_pretrained`` writes and ``slcompile.json`` beside it, with the shape of each weight's factors.
The paper's (github.com/andyjm3/SLTrain) has ``splora_config.json`` and, for each linear layer, ``lora_A`` [rank, in],
``lora_B`` [out, rank], ``sparse_index`` (sorted flat positions) and ``sparse_value``; its scale is alpha / rank, or
``tanh(scaling)`` where that is trained.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slcompile import files
from slcompile.config import STRUCTURES, SLConfig, did_you_mean
from slcompile.convert.ledger import EXPLICIT
from slcompile.export.safetensors import CONFIG, GENERATION, INDEX, WEIGHTS, stale_weights
from slcompile.models import METHOD, bare, hf_config, require_numbers
from slcompile.names import SUFFIX, plain_name
from slcompile.ops.support import IMPORTED
from slcompile.weight.placing import put_in_place
from slcompile.weight.sharing import share_again, sharing
from slcompile.weight.structure import FactorizedWeight, matrix_shape, weights_by_name, weights_in

OURS, PAPERS = "slcompile.json", "splora_config.json"
AS_PUBLISHED = "save_original_format"
"""Argument by which transformers 5 writes names and stacks that are not the model's, but older ones' (ViT, Mixtral)."""
FORMAT = 1
"""Of ``slcompile.json``."""
_WEIGHTS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_STORED = "stored_shape"
"""What says that a weight is a convolution's, [out, in, *kernel], and not a stack of matrices."""


def described_weights(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns what each factorized weight of a model is, by its dense name; JSON holds it."""
    found = {name: _described(weight) for name, weight in weights_by_name(model).items()}
    for name, first in sharing(model).items():
        found[name]["shares"] = first
    return found


def _described(weight: FactorizedWeight) -> dict[str, Any]:
    stored = {_STORED: list(weight.stored_shape)} if weight.convolved else {}
    return {"structure": weight.structure, **weight.describe(), **stored}


def save_factorized(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes a factorized transformers model so that ``load_factorized`` can read it; returns the directory.

    Files are written in a hidden directory in it, and moved. A kill leaves the old model, the new one, or a directory
    that is refused, since its ``config.json`` is no JSON.

    Args:
        model: Left as it is.
        directory: Made if it does not exist. Of an older model in it, the weights in safetensors that
            ``from_pretrained`` would read and ``generation_config.json`` are removed; other files are left alone.

    Raises:
        ValueError: The model has no ``save_pretrained``, no factorized weight, or a tensor on the meta device.
    """
    model = bare(model)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        raise ValueError(f"model must have save_pretrained, as transformers' models do, got {type(model).__name__}")
    described = described_weights(model)
    if not described:
        raise ValueError("model has no factorized weight; use its own save_pretrained")
    require_numbers(model)
    directory = files.writable_directory(directory)
    with files.inside(directory) as scratch:
        state = model.state_dict()
        plain = {plain_name(key): each for key, each in state.items()}  # of layers that torch.compile wrapped, too
        options: dict[str, Any] = {} if plain.keys() == state.keys() else {"state_dict": plain}
        if AS_PUBLISHED in inspect.signature(save_pretrained).parameters:
            options[AS_PUBLISHED] = False
        save_pretrained(scratch, **options)
        config = json.loads((scratch / CONFIG).read_text())
        config["quantization_config"] = {"quant_method": METHOD, "weights": described}  # read by from_pretrained
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (scratch / OURS).write_text(json.dumps({"format": FORMAT, "weights": described}, indent=1))
        stale = stale_weights(directory) | {GENERATION}
        files.move_over(scratch, directory, last=CONFIG, stale=stale)
    return directory


def load_factorized(directory: str | os.PathLike[str]) -> nn.Module:
    """Reads a factorized transformers model that ``save_factorized`` or the paper's code wrote, on the CPU.

    Of a directory it reads the weights and ``generation_config.json`` that ``from_pretrained`` would; each tensor is of
    the dtype that it has there.

    Raises:
        ValueError: The directory holds no such checkpoint, or it does not fit the model of its ``config.json``.
        ImportError: transformers or safetensors is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'reading checkpoints needs {error.name}: pip install "slcompile[examples]"') from error
    directory = Path(directory)
    if not (directory / CONFIG).is_file() or not any((directory / name).is_file() for name in (OURS, PAPERS)):
        raise ValueError(f"{directory} must hold {CONFIG} and {OURS} (ours) or {PAPERS} (the paper's)")
    config = hf_config(directory)
    named = config.architectures or ["LlamaForCausalLM"]
    architecture = named[0] if isinstance(named, list) and isinstance(named[0], str) else str(named)
    model_class: Any = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"config.json names the architecture {architecture!r:.100}, which transformers does not have")
    state = _read_state(directory)
    if (directory / OURS).is_file():
        settings = read_settings(directory / OURS, ("weights", "format"))
        if settings["format"] != FORMAT:
            raise ValueError(f"{directory / OURS}: format must be {FORMAT}, got {settings['format']!r:.100}")
        weights = settings["weights"]
    else:
        state, weights = _from_paper(state, read_settings(directory / PAPERS, ("r", "lora_alpha", "sp_ratio")))
    if not isinstance(weights, dict):
        raise ValueError(f"{directory / OURS}: weights must be an object, got {weights!r:.100}")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(state):
        raise ValueError(
            f"{directory} does not fit: config.json has {layers} layers, and the files {len(state)} tensors"
        )
    try:
        with torch.device("meta"):  # first: sizes in config.json may be of another model, and too large to allocate
            _require_fit(_with_weights(model_class, config, weights), state)
        model = _with_weights(model_class, config, weights)
        _take_dtypes(model, state)
        model.load_state_dict(state, strict=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{directory} does not fit {architecture}: {error}") from error
    model.tie_weights()
    if model.can_generate() and (directory / GENERATION).is_file():
        model.generation_config = _generation_config(directory)
    vars(model)[EXPLICIT] = SLConfig()
    return model


def _generation_config(directory: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # JSON, and the class's own checks
        raise ValueError(f"{directory / GENERATION}: {type(error).__name__}: {error}"[:1000]) from error


def _with_weights(model_class: Any, config: Any, weights: Mapping[str, Any]) -> Any:
    """Makes the model of a configuration with empty factorized weights, on the device that is the default."""
    try:
        model: nn.Module = model_class(copy.deepcopy(config))
    except Exception as error:  # of transformers, which config.json makes do anything
        raise ValueError(f"config.json: {type(error).__name__}: {error}"[:500]) from error
    install(model, weights)
    return model


def _require_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a state dict has not the tensors of a model, in its shapes."""
    own, given = dict(model.state_dict(keep_vars=True)), set(state)
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    read = {id(own[name]) for name in given & own.keys()}
    tied |= {name for name, each in own.items() if id(each) in read}  # by another of its names
    missing, unexpected = sorted(own.keys() - given - tied), sorted(given - own.keys())
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}"[:1000])
    for name, each in state.items():
        if each.shape != own[name].shape or each.is_floating_point() != own[name].is_floating_point():
            wanted = f"{tuple(own[name].shape)} {own[name].dtype}"
            raise ValueError(f"{name} must be {wanted}, got {tuple(each.shape)} {each.dtype}")


def _take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a model's tensors the dtypes of a state dict; the trained parts of one weight one that holds them all."""
    own = model.state_dict(keep_vars=True)
    dtypes = {id(own[name]): each.dtype for name, each in state.items() if each.is_floating_point()}
    for weight in weights_in(model):
        trained = [each for name, each in weight.named_parameters() if name != "base"]
        widest = reduce(torch.promote_types, [dtypes.get(id(each), each.dtype) for each in trained])
        dtypes |= dict.fromkeys(map(id, trained), widest)
    for tensor in own.values():
        tensor.data = tensor.data.to(dtypes.get(id(tensor), tensor.dtype))


def read_settings(file: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """Reads a JSON object; ValueError where it is none, or lacks a key."""
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(settings, dict) or any(key not in settings for key in needed):
        raise ValueError(f"{file} must be an object with {', '.join(needed)}")
    return settings


def install(model: nn.Module, weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts empty factorized weights, as ``described_weights`` describes them, in the place of dense ones.

    Raises:
        ValueError: The model has no such weight, or what is described is not allowed.
    """
    made = {name: _install(model, name, described) for name, described in weights.items()}
    share_again(made, {name: described["shares"] for name, described in weights.items() if "shares" in described})


def _install(model: nn.Module, name: str, described: Any) -> FactorizedWeight:
    """Puts an empty factorized weight in the place of a dense one, in every module that holds it; returns it."""
    try:
        dense = model.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"the checkpoint factorizes {name:.200}, which the model does not have") from error
    settings = dict(described) if isinstance(described, Mapping) else {}
    stored = settings.pop(_STORED, None)
    convolved = stored is not None
    is_possible = dense.dim() in (2, 3) if not convolved else dense.dim() in (3, 4, 5) and stored == list(dense.shape)
    if settings.get("input_dim") not in (0, 1) or not is_possible:
        raise ValueError(f"the checkpoint holds {name} as {described!r:.200}; its shape is {tuple(dense.shape)}")
    shape = matrix_shape(dense.shape, convolved)
    settings.pop("shares", None)
    structure = settings.pop("structure", None)
    if structure not in tuple(STRUCTURES):
        raise ValueError(f"the checkpoint holds {name} as {structure!r:.200}{did_you_mean(structure, STRUCTURES)}")
    rank = settings.get("rank")
    if isinstance(rank, int) and rank > max(shape):
        raise ValueError(f"the checkpoint holds {name}, {tuple(dense.shape)}, with rank={rank}")
    try:
        weight = STRUCTURES[structure].from_description(shape, settings, name=name, dtype=dense.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint holds {name} as {described!r:.200}: {error}") from error
    for module in list(model.modules()):
        for attribute, parameter in list(module._parameters.items()):
            if parameter is dense:
                put_in_place(module, attribute, weight.stored_as(dense.shape))
    return cast(FactorizedWeight, weight)


def _from_paper(
    state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns a state dict of the paper's code in our keys, and what its weights are."""
    renamed: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for name in ("r", "lora_alpha"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"{PAPERS}: {name} must be a number above 0, got {value!r:.100}")
    scale = settings["lora_alpha"] / settings["r"]
    for key, value in state.items():
        owner, _, part = key.rpartition(".")
        prefix = f"{owner}.weight{SUFFIX}"
        if part == "lora_A":
            renamed[f"{prefix}.A"] = value
        elif part == "lora_B":
            trained = state.get(f"{owner}.scaling")
            factor = 1.0 if trained is None else trained.double().tanh() / scale
            renamed[f"{prefix}.B"] = (value.double() * factor).to(value.dtype)
            weights[f"{owner}.weight"] = {
                "structure": "sparse_low_rank",
                "rank": settings["r"],
                "alpha": settings["lora_alpha"],
                "density": settings["sp_ratio"],
                "support": "uniform",
                "input_dim": 1,
            }
        elif part == "sparse_value":
            renamed[f"{prefix}.values"] = value
        elif part == "sparse_index":
            renamed[f"{prefix}.index"] = value
            renamed[f"{prefix}.seed"] = torch.tensor([IMPORTED])
        elif part != "scaling":
            renamed[key] = value
    return renamed, weights


def _read_state(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        found = read_tensors(file)
        if not isinstance(found, Mapping):
            raise ValueError(f"{file} must hold tensors by name, got {type(found).__name__}")
        if twice := sorted(map(str, found.keys() & state.keys())):
            raise ValueError(f"{file} holds {', '.join(twice):.500}, which another file of {directory} holds, too")
        state |= found
    if not state:
        raise ValueError(f"{directory} must hold tensors, and its files hold none")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{directory}: {name!r:.200} must be the name of a tensor, got {type(value).__name__}")
    return state


def _weight_files(directory: Path) -> list[Path]:
    """Returns the files of weights that ``from_pretrained`` would read: the first of ``_WEIGHTS``, or what it names."""
    found = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise ValueError(f"{directory} must hold {' or '.join(_WEIGHTS)}")
    if found.suffix != ".json":
        return [found]
    named = read_settings(found, ("weight_map",))["weight_map"]
    names = list(named.values()) if isinstance(named, dict) else [named]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{found}: weight_map must name files beside it, got {name!r:.200}")
    return [directory / name for name in sorted(set(names))]


def read_tensors(file: Path) -> Any:
    """Reads what a safetensors or .bin file holds; ValueError where it cannot be read."""
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True)
        from safetensors.torch import load_file

        return load_file(file)
    except ImportError:
        raise
    except Exception as error:  # neither reader says what it may raise for a broken file
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}"[:1000]) from error
