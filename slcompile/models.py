"""A user's model: without wrappers, its arguments, from a configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import did_you_mean
from slcompile.torch_private import leaves_with_paths, map_leaves


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model itself, where torch.compile's wrapper is given.

    Raises:
        ValueError: It is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return torch_private.without_wrappers(model)


def bare(model: nn.Module) -> nn.Module:
    """Returns the model itself as ``unwrapped``, and where DDP or DataParallel is given: what is written to files."""
    inner: Any = unwrapped(model)
    is_parallel = isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return bare(inner.module) if is_parallel else inner


def require_numbers(model: nn.Module) -> None:
    """Raises ValueError naming a parameter or buffer that is on the meta device."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers")


METHOD = "slcompile"
"""The ``quant_method`` of a ``config.json``, by which transformers finds ``slcompile.integrations.transformers``."""


def forget_factors(config: Any) -> None:
    """Takes from a transformers config what says that the model's weights are factors; of other configs nothing."""
    held = getattr(config, "quantization_config", None)
    method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
    if method == METHOD:
        del config.quantization_config


def meta_copy(model: nn.Module) -> nn.Module:
    """Copies a model to the meta device; nothing of its size is allocated, and ties stay ties."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deep_copy(model, memo)


def deep_copy(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """Copies a model; results of its last call that it holds (an auxiliary loss) are in the copy without their graph.

    ``memo`` is as in ``copy.deepcopy``.
    """
    results = [each for module in model.modules() for each in tensors_beside(module) if not each.is_leaf]
    return copy.deepcopy(model, {**(memo or {}), **{id(each): each.detach() for each in results}})


def tensors_beside(module: nn.Module) -> list[Tensor]:
    """Returns the tensors in a module's attributes (lists and dictionaries too) that are no parameters or buffers."""
    known = ("_parameters", "_buffers", "_modules")
    attributes = [value for name, value in vars(module).items() if name not in known]
    return [leaf for _, leaf in leaves_with_paths(attributes) if isinstance(leaf, Tensor)]


def positional(args: Sequence[Any] | Tensor, name: str = "args") -> tuple[Any, ...]:
    """Returns positional arguments as a tuple; a tensor alone is one of them.

    Raises:
        ValueError: They are neither a sequence nor a tensor.
    """
    if isinstance(args, Tensor):
        return (args,)
    if not isinstance(args, Sequence) or isinstance(args, str):
        hint = "; what has names is given as kwargs" if isinstance(args, Mapping) else ""
        raise ValueError(f"{name} must be a sequence of arguments, or a tensor, got {type(args).__name__}{hint}")
    return tuple(args)


def arguments_for(model: nn.Module, arguments: Any) -> Any:
    """Returns nested arguments on a model's device, floating-point ones in its dtype."""
    if isinstance(arguments, Mapping):
        arguments = dict(arguments)  # such as transformers' BatchEncoding, which torch takes for a leaf
    parameter = next((each for each in model.parameters() if each.is_floating_point()), None)
    if parameter is None:
        return arguments

    def move(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return each.to(parameter.device, parameter.dtype if each.is_floating_point() else each.dtype)

    return map_leaves(move, arguments)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Puts a model into ``eval`` mode, and afterwards each module into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def layers_as_in_training() -> Iterator[None]:
    """Within, torch's attention and encoder layers compute product by product in inference, too.

    There each is one op otherwise, in which no product with a weight is seen, and which fills padding with zeros.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def random_state_restored(model: nn.Module) -> Iterator[None]:
    """Puts torch's random state back afterwards, of the CPU and of the GPUs that a model is on."""
    with torch.random.fork_rng(devices=gpus_of(model)):
        yield


def gpus_of(model: nn.Module) -> list[int]:
    """Returns the numbers of the GPUs that a model is on."""
    return sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})


@contextmanager
def buffers_restored(model: nn.Module, but: type[nn.Module] | tuple[()] = ()) -> Iterator[None]:
    """Puts a model's buffers and their numbers back afterwards, but for those of modules of the type ``but``."""
    held = [(each._buffers, dict(each._buffers)) for each in model.modules() if not isinstance(each, but)]
    buffers = [(each, each.clone()) for _, own in held for each in own.values() if each is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)
        for now, own in held:
            now.update(own)


LLAMAS = {
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
    "llama-33b": (6656, 17920, 60, 52),
}
"""The paper's models, and two larger ones of the first LLaMA: width, intermediate width, layers, heads. They have a
vocabulary of 32000 and a head of its own."""

LLAMAS_3 = {
    "llama-3-8b": (4096, 14336, 32, 32),
    "llama-3-70b": (8192, 28672, 80, 64),
    "llama-3-405b": (16384, 53248, 126, 128),
}
"""Likewise; 8 key-value heads and a vocabulary of 128256."""

MIXTURES = {"mixtral-8x7b": (4096, 14336, 32, 32)}
"""Likewise; 8 key-value heads, a vocabulary of 32000, and 8 experts, two of which serve a token."""

KNOWN = (*LLAMAS, *LLAMAS_3, *MIXTURES)


def known_config(name: str) -> Any:
    """Returns the transformers configuration of one of ``KNOWN``.

    Raises:
        ValueError: There is none of that name.
        ImportError: transformers is not installed.
    """
    if name not in KNOWN:
        raise ValueError(f"model got {name!r}{did_you_mean(name, KNOWN)}")
    width, intermediate, layers, heads = (LLAMAS | LLAMAS_3 | MIXTURES)[name]
    shape = {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 128256 if name in LLAMAS_3 else 32000,
        "tie_word_embeddings": False,
        **({} if name in LLAMAS else {"num_key_value_heads": 8}),
    }
    if name in MIXTURES:
        return require_transformers().MixtralConfig(**shape)
    return require_transformers().LlamaConfig(**shape)


def hf_config(path: str | os.PathLike[str]) -> Any:
    """Returns the transformers configuration in a file, or in a directory's config.json.

    Raises:
        ValueError: There is no such file, or transformers cannot read it.
        ImportError: transformers is not installed.
    """
    if not Path(path).exists():  # transformers would take the path for a name on the hub
        raise ValueError(f"path of the configuration must be a file or a directory, got {os.fspath(path)!r}")
    try:
        return require_transformers().AutoConfig.from_pretrained(os.fspath(path))
    except ImportError:
        raise
    except Exception as error:  # JSON, the config's own checks of types, whatever a class does with its fields
        message = (
            f"{os.fspath(path)} holds no configuration that transformers can read: {type(error).__name__}: {error}"
        )
        raise ValueError(message[:1000]) from error


def require_transformers() -> Any:
    """Returns the module transformers; ImportError with the pip command where it is missing."""
    try:
        import transformers
    except ImportError as error:
        message = 'a configuration needs transformers: pip install "slcompile[examples]"'
        raise ImportError(message) from error
    return transformers
