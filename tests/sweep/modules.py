"""Modules of ``torch.nn``, with the sizes and inputs of torch's own tests of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db

import slcompile

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


@dataclass(frozen=True)
class OfTorch:
    """A class of module in torch's database."""

    info: ModuleInfo
    family: str = "module"
    options: slcompile.SLConfig = CONFIG
    exports: bool = False

    def make(self) -> nn.Module:
        """The first of its variants whose weights are matrices, in training mode."""
        return Variants([module for module, _ in self._variants()])

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """What each of them is called with."""
        return {"calls": [call for _, call in self._variants()]}

    def _variants(self) -> list[tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]]:
        found = []
        given = self.info.module_inputs_func(
            self.info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for each in given:
            if each.forward_input is None or len(found) == VARIANTS:
                continue
            args, kwargs = each.forward_input.args, each.forward_input.kwargs
            # Nested tensors are a layout of their own, which Inductor does not compile.
            if any(isinstance(value, Tensor) and value.is_nested for value in (*args, *kwargs.values())):
                continue
            module = self.info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
            if any(parameter.dim() == 2 for parameter in module.parameters()):
                found.append((without_dropout(module).train(), (args, kwargs)))
        return found


def without_dropout(module: nn.Module) -> nn.Module:
    """The module with every dropout set to 0."""
    for each in module.modules():
        for name, value in list(vars(each).items()):
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(each, nn.Dropout))):
                setattr(each, name, 0.0)
    return module


NAMES = frozenset(
    f"nn.{name}"
    for name in """Linear LinearCrossEntropyLoss TransformerEncoder TransformerEncoderLayer TransformerDecoderLayer
    Transformer MultiheadAttention RNNCell GRUCell LSTMCell RNN GRU LSTM""".split()
)
"""Modules that multiply with a parameter."""

MODULES = {info.name: OfTorch(info) for info in module_db if info.name in NAMES}
