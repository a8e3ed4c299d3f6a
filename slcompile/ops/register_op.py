"""How ops are registered that are called so often that ``custom_op``'s layers of Python would count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def register_op(device: str = "default", tags: Sequence[torch.Tag] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as the op ``slcompile::<its name>`` of a device, or of all; returns the op's overload.

    It mutates no argument. Its fake and its derivative are registered with ``torch.library``, as for any op.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = f"slcompile::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(name, device, function)
        return getattr(torch.ops.slcompile, function.__name__).default

    return register
