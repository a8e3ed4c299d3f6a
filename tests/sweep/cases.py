"""All that the sweep measures, and the smaller batches that a model takes, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import slcompile
from tests.sweep.architectures import ARCHITECTURES, LENGTH
from tests.sweep.handmade import HANDMADE
from tests.sweep.modules import MODULES

TEXT = frozenset("input_ids attention_mask labels".split())
"""What a model takes whose texts may have any length."""

OTHER_LENGTH, FEW = 11, 3


class Case(Protocol):
    """A model and what it is called with."""

    @property
    def family(self) -> str: ...
    @property
    def options(self) -> slcompile.SLConfig: ...
    @property
    def exports(self) -> bool: ...
    def make(self) -> nn.Module: ...
    @property
    def inputs(self) -> Any: ...


CASES: dict[str, Case] = {**ARCHITECTURES, **HANDMADE, **MODULES}


def longer_or_shorter(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Texts of another length; of what is no text, a row more. Empty where nothing may vary."""
    if is_text(inputs):
        return {name: each[:, :OTHER_LENGTH].contiguous() for name, each in inputs.items()}
    if case.family == "module":
        return {}
    return {name: torch.cat([each, each[:1]]) if is_batch(each) else each for name, each in inputs.items()}


def fewer(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One text of few tokens; of what is no text, one row. Empty where nothing may vary."""
    if is_text(inputs):
        return {name: each[:1, :FEW].contiguous() for name, each in inputs.items()}
    if case.family == "module":
        return {}
    return {name: each[:1] if is_batch(each) else each for name, each in inputs.items()}


def is_text(inputs: Mapping[str, Any]) -> bool:
    """Whether all inputs are texts."""
    return inputs.keys() <= TEXT and all(each.shape[1] == LENGTH for each in inputs.values())


def is_batch(each: Any) -> bool:
    """Whether a value has a row for each element of the batch."""
    return isinstance(each, Tensor) and each.dim() > 0
