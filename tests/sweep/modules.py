"""Modules of ``torch.nn``, with the sizes and inputs of torch's own tests of them.

Those that multiply with a parameter have a row each. The others read what a linear layer gives, many of them in a row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db

import slcompile
from tests.sweep.running import leaves

CONFIG = slcompile.SLConfig(rank=1, density=0.2, seed=1, min_dim=1)
"""Torch's tests have weights of very few rows."""

VARIANTS = 6


class Variants(nn.Module):
    """The same class of module, made with several arguments."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.variants = nn.ModuleList(modules)

    def forward(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        return [module(*args, **kwargs) for module, (args, kwargs) in zip(self.variants, calls, strict=True)]


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class OfTorch:
    """Classes of modules in torch's database.

    Attributes:
        infos: Their entries.
        variants: How many arguments each is made with at most.
        behind: Whether each reads what a linear layer gives, and not its input itself.
    """

    infos: tuple[ModuleInfo, ...]
    variants: int = VARIANTS
    behind: bool = False
    family: str = "module"
    options: slcompile.SLConfig = CONFIG
    exports: bool = False

    def make(self) -> nn.Module:
        """All variants in one model, in training mode."""
        return Variants([module for module, _ in self._variants()])

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """What each of them is called with."""
        return {"calls": [call for _, call in self._variants()]}

    def _variants(self) -> list[tuple[nn.Module, Call]]:
        return [found for info in self.infos for found in self._of(info)]

    def _of(self, info: ModuleInfo) -> list[tuple[nn.Module, Call]]:
        found: list[tuple[nn.Module, Call]] = []
        given = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
        for each in given:
            if each.forward_input is None or len(found) == self.variants:
                continue
            args, kwargs = each.forward_input.args, each.forward_input.kwargs
            # Nested tensors are a layout of their own, which Inductor does not compile.
            if any(isinstance(value, Tensor) and value.is_nested for value in (*args, *kwargs.values())):
                continue
            module = info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
            module = without_dropout(module).train()
            if not self.behind:
                if any(parameter.dim() == 2 for parameter in module.parameters()):
                    found.append((module, (args, kwargs)))
            elif can_read(args):
                module = Behind(module, args[0].shape[-1])
                if is_function(module, (args, kwargs)):
                    found.append((module, (args, kwargs)))
        return found


class Behind(nn.Module):
    """A module whose first input comes from a linear layer."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self.linear, self.module = nn.Linear(width, width), module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.module(self.linear(x), *args, **kwargs)


def can_read(args: tuple[Any, ...]) -> bool:
    """Whether the first input may come from a linear layer which rank 1 makes smaller."""
    x = args[0] if args else None
    return isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() >= 2 and x.shape[-1] >= 3


def is_function(module: nn.Module, call: Call) -> bool:
    """Whether a module takes this call and draws no random numbers, which float64 would draw others of."""
    args, kwargs = call
    try:
        results = [leaves(copy.deepcopy(module)(*args, **kwargs)) for _ in range(2)]
    except (RuntimeError, ValueError):  # such as a loss of probabilities
        return False
    return bool(results[0]) and all(bool((results[0][name] == each).all()) for name, each in results[1].items())


def without_dropout(module: nn.Module) -> nn.Module:
    """The module with every dropout set to 0."""
    for each in module.modules():
        for name, value in list(vars(each).items()):
            is_dropout = "dropout" in name or (name == "p" and isinstance(each, nn.modules.dropout._DropoutNd))
            if isinstance(value, float) and is_dropout:
                setattr(each, name, 0.0)
    return module


NAMES = frozenset(
    f"nn.{name}"
    for name in """Linear LinearCrossEntropyLoss TransformerEncoder TransformerEncoderLayer TransformerDecoderLayer
    Transformer MultiheadAttention RNNCell GRUCell LSTMCell""".split()
)
"""Modules that multiply with a parameter; but for recurrent layers, which Dynamo does not capture."""

TOGETHER = 22

_BEHIND = [
    info for info in module_db if info.name not in {*NAMES, "nn.RNN", "nn.GRU", "nn.LSTM"} and "Lazy" not in info.name
]
MODULES = {info.name: OfTorch((info,)) for info in module_db if info.name in NAMES} | {
    f"nn.Linear+{start // TOGETHER + 1}": OfTorch(tuple(_BEHIND[start : start + TOGETHER]), variants=1, behind=True)
    for start in range(0, len(_BEHIND), TOGETHER)
}
