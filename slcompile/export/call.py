"""The call that a model is exported for: its arguments, dynamic shapes and names, in the order of the inputs."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.export.twin import evaluating
from slcompile.models import arguments_for
from slcompile.torch_private import leaves_with_paths

log = logging.getLogger("slcompile")


@dataclass(frozen=True)
class Call:
    """What a model is called with, and what its tensors are named.

    Attributes:
        args, kwargs: In the order of the model's signature. That is what torch.export flattens, and so the order of
            the graph's inputs, whatever order the user's keyword arguments had.
        shapes: Dynamic shapes of each argument by its name, as ``torch.onnx.export`` takes them; None: all are static.
        input_names: A name for each tensor among the arguments.
        output_names: A name for each tensor among the outputs.
        axis_names: For each tensor among the arguments, dimension -> the name that its dynamic shape gives it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Any] | None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    axis_names: tuple[Mapping[int, str], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> Call:
        """Binds arguments to a model's signature, and names inputs and axes.

        Raises:
            ValueError: ``dynamic_shapes`` are of arguments that are not there.
        """
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        if isinstance(dynamic_shapes, (tuple, list)):
            if len(dynamic_shapes) > len(bound.arguments):
                raise ValueError(
                    f"dynamic_shapes must be of the {len(bound.arguments)} arguments given, got {len(dynamic_shapes)}"
                )
            dynamic_shapes = dict(zip(bound.arguments, dynamic_shapes, strict=False))
        for name, spec in (dynamic_shapes or {}).items():
            if spec is not None and name not in bound.arguments:
                raise ValueError(
                    f"dynamic_shapes must be of the arguments given, {', '.join(bound.arguments)}, got {name!r}"
                )
        shapes = None if dynamic_shapes is None else {name: dynamic_shapes.get(name) for name in bound.arguments}
        arguments = dict(bound.arguments)
        names = [_dotted(path, "past_key_values") for path, leaf in leaves_with_paths(arguments) if _is_tensor(leaf)]
        axes = [_axis_names(spec) for spec in _leaf_specs(arguments, shapes or {})]
        positional, by_name = bound.args, bound.kwargs
        if bound.args and isinstance(bound.args[-1], Mapping):
            # torch.onnx.export takes a dict at the end of the arguments for keyword arguments.
            positional, by_name = (), {**dict(zip(arguments, bound.args, strict=False)), **bound.kwargs}
        return cls(positional, by_name, shapes, tuple(names), (), tuple(axes))

    def renamed(
        self, input_names: Sequence[str] | None, output_names: Sequence[str] | None, taken: Collection[str]
    ) -> Call:
        """Returns the call with a user's names, where they are given; others differ from each other and from ``taken``.

        Raises:
            ValueError: There are not as many as there are tensors, or one is another's or of ``taken``.
        """
        for argument, given, own in (
            ("input_names", input_names, self.input_names),
            ("output_names", output_names, self.output_names),
        ):
            if given is not None and len(given) != len(own):
                raise ValueError(f"{argument} must have {len(own)} names, one for each tensor, got {len(given)}")
        inputs = tuple(input_names or (f"input_{each}" if each in taken else each for each in self.input_names))
        used = {*taken, *inputs}
        outputs = tuple(output_names or (f"output_{each}" if each in used else each for each in self.output_names))
        for name, count in Counter((*inputs, *outputs, *taken)).items():
            if count > 1:
                raise ValueError(
                    f"input_names and output_names must differ from each other and from the names of weights, got "
                    f"{name!r} {count} times"
                )
        return replace(self, input_names=inputs, output_names=outputs)

    def with_outputs(self, model: nn.Module) -> Call:
        """Runs the model once, and returns the call with the outputs named."""
        leaves = leaves_with_paths(self.run(model))
        names = [_dotted(path, "present") for path, leaf in leaves if _is_tensor(leaf)]
        named = (f"output_{name}" if name[:1].isdecimal() else name or "output" for name in names)
        return replace(self, output_names=tuple(named))

    def on(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments on a model's device, floating-point ones in its dtype."""
        args, kwargs = arguments_for(model, (self.args, self.kwargs))
        return args, kwargs

    def run(self, model: nn.Module) -> Any:
        """Returns what the model returns, in eval mode and without gradients."""
        args, kwargs = self.on(model)
        with evaluating(model):
            return model(*args, **kwargs)

    def resized(self, model: nn.Module) -> list[Call]:
        """Returns the same content with every dynamic dimension half as long, or twice: the first that the model takes.

        Empty where nothing is dynamic, or where the model accepts neither, which is said.
        """
        if self.shapes is None:
            return []
        bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        original = dict(bound.arguments)
        for resize in (_half, _twice):
            for name, value in original.items():
                bound.arguments[name] = _resized(value, self.shapes[name], resize)
            other = replace(self, args=bound.args, kwargs=bound.kwargs)
            with contextlib.suppress(RuntimeError, ValueError, IndexError):
                other.run(model)
                return [other]
        log.warning(
            "slcompile: outputs are compared at one shape only: the model accepts neither half nor twice the sizes of "
            "its dynamic dimensions"
        )
        return []


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns the tensors of nested arguments or outputs, in the order in which torch.export flattens them."""
    return [leaf for _, leaf in leaves_with_paths(tree) if _is_tensor(leaf)]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _axis_names(spec: Any) -> dict[int, str]:
    dims = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
    named = {dim: each if isinstance(each, str) else getattr(each, "__name__", None) for dim, each in dims}
    return {dim: name for dim, name in named.items() if name}


def _dotted(path: Sequence[str], cache: str) -> str:
    """Joins a path; ``past_key_values`` / ``key_cache`` / ``0`` is ``<cache>.0.key``, Hugging Face's name."""
    if path[:1] in (("past_key_values",), ("cache",)) and len(path) >= 3:
        kind = next((kind for kind in ("key", "value") if any(kind in part for part in path[1:])), None)
        index = next((part for part in path[1:] if part.isdecimal()), None)
        if kind and index:
            return f"{cache}.{index}.{kind}"
    return ".".join(path)


def _leaf_specs(value: Any, spec: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [spec]
    if isinstance(value, Mapping):
        return [leaf for key, each in value.items() for leaf in _leaf_specs(each, spec.get(key) if spec else None)]
    if isinstance(value, (list, tuple)):
        specs = spec if spec else [None] * len(value)
        return [leaf for each, inner in zip(value, specs, strict=True) for leaf in _leaf_specs(each, inner)]
    return []


def _resized(value: Any, shapes: Any, resize: Callable[[Tensor, int], Tensor]) -> Any:
    if shapes is None:
        return value
    if isinstance(value, Tensor):
        dims = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes)
        for dim, spec in dims:
            is_static = spec is None or isinstance(spec, int) or spec is torch.export.Dim.STATIC
            value = value if is_static else resize(value, dim)
        return value
    if isinstance(value, Mapping):
        return {key: _resized(each, shapes.get(key), resize) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resized(each, spec, resize) for each, spec in zip(value, shapes, strict=True))
    return value


def _half(tensor: Tensor, dim: int) -> Tensor:
    return tensor.narrow(dim, 0, max(1, tensor.shape[dim] // 2))


def _twice(tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor, tensor], dim)
