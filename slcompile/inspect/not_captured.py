"""Rows for the layers whose weight no matmul of a captured graph reads, and why: what runs in Python, among them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from slcompile import torch_private
from slcompile.convert.weight_uses import weight_modules
from slcompile.inspect.rows import ADAM, Change, MatmulRow
from slcompile.inspect.snapshot import source_line
from slcompile.passes import Decision
from slcompile.torch_private import SkippedFrame
from slcompile.weight.placing import base_class


def not_captured(
    model: nn.Module, seen: Mapping[int, Decision | None], skipped: Sequence[SkippedFrame]
) -> Iterator[MatmulRow]:
    """Yields rows for linear and convolution layers whose weight no matmul of a captured graph reads.

    Args:
        model: That was explained.
        seen: By the id of each parameter that captured graphs read, why it stays dense where no matmul reads it (a
            convolution of groups); None where one does.
        skipped: What Dynamo gave up.
    """
    frames = {each.code: each for each in skipped}
    paths = {id(module): path for path, module in model.named_modules()}
    for path, module, _ in weight_modules(model):
        weight = module._parameters.get("weight")
        if weight is None or (id(weight) in seen and seen[id(weight)] is None):
            continue
        read = seen.get(id(weight))
        reason, detail = (read.reason, read.detail) if read else _why(model, paths[id(module)], frames)
        yield MatmulRow(
            name=f"{path}.weight".lstrip("."),
            shape=tuple(weight.shape),
            tokens=None,
            graph=None,
            decision="left",
            reason=reason,
            detail=detail,
            rank=None,
            density=None,
            nonzeros=None,
            lowering="",
            costs={},
            bytes=Change(*[weight.nbytes * (ADAM if weight.requires_grad else 1)] * 2),
            flops=Change(0, 0),
            source="",
            node="",
        )


def _why(model: nn.Module, path: str, frames: Mapping[tuple[str, int], SkippedFrame]) -> tuple[str, str]:
    """Returns a code and a sentence: what the innermost module says that is disabled or was skipped."""
    names = [name for name in path.split(".") if name]
    modules = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    for module, child in reversed(list(zip(modules, [*names, "weight"], strict=True))):
        disabled = _disabled_function(module, child)
        if disabled:
            return "disabled", f"{disabled} is under torch.compiler.disable()"
        for code in _codes(module):
            if (frame := frames.get(code)) is not None:
                sentence, source = first_line(frame.reason), source_line(frame.stack_trace)
                return "graph_break", f"Dynamo skips {_kind(module)}.forward: {sentence}, at {source}"
    return "not_captured", "no captured graph reads it: this call does not reach it, or Dynamo skips the code that does"


def _disabled_function(module: nn.Module, child: str) -> str:
    """Finds what calls a module's child and is disabled: the module, its forward, a method that names the child."""
    if torch_private.is_disabled(module):
        return _kind(torch_private.without_wrappers(module))
    if any(torch_private.is_disabled(getattr(module, name)) for name in ("forward", "_call_impl")):
        return f"{_kind(module)}.forward"
    for kind in type(module).__mro__:
        for name, method in vars(kind).items():
            code = getattr(torch_private.without_disable(method), "__code__", None)
            if torch_private.is_disabled(method) and code is not None and child in code.co_names:
                return f"{_kind(module)}.{name}"
    return ""


def _codes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields file and line of a module's forward, and of each function that decorators made of it."""
    function: Any = inspect.unwrap(module.forward)
    for called in (module.forward, function):
        code = getattr(called, "__code__", None)
        if code is not None:
            yield code.co_filename, code.co_firstlineno


def _kind(module: nn.Module) -> str:
    return base_class(module).__name__


def first_line(reason: str) -> str:
    """Returns the sentence with which one of Dynamo's longer reasons begins."""
    return reason.strip().partition("\n")[0]
