"""The subclass that puts a factorized weight in a dense weight's place.

A converted module's class becomes a subclass in which the weight's name is a property that reads the submodule
``<name>_sl``. The subclass is one per (class, names), not one per module as in torch.nn.utils.parametrize: Dynamo
guards on the type, and N equal blocks must share one compiled graph.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from slcompile.names import SUFFIX, plain_name, qualified
from slcompile.weight.marks import successor_of
from slcompile.weight.structure import FactorizedWeight

_ORDER = "_slcompile_order"
"""Attribute of a converted module: name of each factorized weight -> the order of ``_parameters`` with it."""


@functools.cache
def sl_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Returns the subclass of ``base`` in which ``names`` are properties that compose a weight.

    Raises:
        TypeError: ``base`` cannot be subclassed (scripted modules, some metaclasses).
    """

    def refuse(name: str, value: Any) -> AttributeError:
        todo = "change the factors, or call slcompile.merge_(model) first to make it a dense parameter again"
        if isinstance(value, nn.Parameter) and successor_of(value) is not None:
            todo = "what it is given is a dense weight from before its conversion: take named_parameters() again"
        return AttributeError(f"{base.__name__}.{name} is composed from {name}{SUFFIX} and cannot be assigned; {todo}")

    def __setattr__(self: nn.Module, key: str, value: Any) -> None:
        if key in names:
            raise refuse(key, value)
        base.__setattr__(self, key, value)

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in names:
            raise refuse(name, param)
        base.register_parameter(self, name, param)

    def reset_parameters(self: nn.Module) -> None:
        weights = [getattr(self, name + SUFFIX) for name in names]
        if hasattr(base, "reset_parameters"):
            with shapes_only(weights):
                base.reset_parameters(self)  # bias and the like
        for weight in weights:
            weight.reset_parameters()

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, args, *rest = cast(tuple, base.__reduce_ex__(self, max(protocol, 2)))
        return (_remake, (base, names, make, tuple(base if each is type(self) else each for each in args)), *rest)

    def compose_property(name: str) -> property:
        submodule = name + SUFFIX
        return property(lambda self: getattr(self, submodule)())

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # type(module)(...) builds a new, dense one. __new__ alone, by which DataParallel copies a module, does not.
        self.__class__ = base
        self.__init__(*args, **kwargs)

    members = {
        "__init__": __init__,
        "__setattr__": __setattr__,
        "register_parameter": register_parameter,
        "reset_parameters": reset_parameters,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "sl_base": base,
        **{name: compose_property(name) for name in names},
    }
    return types.new_class(f"SL{base.__name__}", (base,), exec_body=lambda namespace: namespace.update(members))


@contextlib.contextmanager
def shapes_only(weights: Sequence[FactorizedWeight]) -> Iterator[None]:
    """Within, these weights read as tensors on the meta device: what is drawn for them is discarded, not composed."""
    for weight in weights:
        vars(weight)["forward"] = functools.partial(torch.empty, weight.stored_shape, device="meta")
    try:
        yield
    finally:
        for weight in weights:
            del vars(weight)["forward"]


def _remake(base: Any, names: tuple[str, ...], make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Returns what pickle and deepcopy call: makes the module as its own class would, and gives it the subclass."""
    module = make(*args)
    module.__class__ = sl_class(base, names)
    return module


def sl_names(module: nn.Module) -> tuple[str, ...]:
    """Returns names of the factorized weights that this module owns itself; empty for an ordinary module."""
    names = (
        name.removesuffix(SUFFIX) for name, child in module._modules.items() if isinstance(child, FactorizedWeight)
    )
    return tuple(sorted(names))


def dense_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's parameters as they are when all weights are dense: patterns match these."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, FactorizedWeight):
            names.append(path.removesuffix(SUFFIX))
        else:
            names += [qualified(path, name) for name, _ in module.named_parameters(recurse=False)]
    return [plain_name(name) for name in names]


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module as it was before conversion."""
    return getattr(type(module), "sl_base", type(module))


def class_with(module: nn.Module, names: tuple[str, ...]) -> type[nn.Module]:
    """Returns the class that a module needs where these of its weights are factorized.

    Raises:
        TypeError: As ``sl_class``.
    """
    if not names or isinstance(module, fx.GraphModule):  # a graph reads the factors itself, and nobody else reads it
        return base_class(module)
    base: Any = base_class(module)  # mypy takes an unbound Module.__hash__ for the class's own
    return sl_class(base, names)


def snapshot(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, type, dict, dict, dict]]:
    """Returns what ``put_in_place`` and ``take_out`` change of these modules, for ``restore``."""
    orders = [(each, dict(vars(each).get(_ORDER, {}))) for each in modules]
    return [(each, type(each), dict(each._parameters), dict(each._modules), order) for each, order in orders]


def restore(before: Iterable[tuple[nn.Module, type, dict, dict, dict]]) -> None:
    """Puts modules back as they were at their ``snapshot``, at whatever point the change was interrupted."""
    for module, kind, parameters, children, order in before:
        module.__class__ = kind
        for current, old in ((module._parameters, parameters), (module._modules, children)):
            current.clear()
            current.update(old)
        vars(module).pop(_ORDER, None)
        if order:
            vars(module)[_ORDER] = order


def put_in_place(module: nn.Module, name: str, weight: FactorizedWeight) -> None:
    """Replaces the dense parameter ``name`` by ``weight``: afterwards ``module.<name>`` is the composed tensor."""
    cls = class_with(module, tuple(sorted({*sl_names(module), name})))
    order = list(module._parameters)
    module.add_module(name + SUFFIX, weight)  # raises where the name is taken
    module.__class__ = cls
    vars(module).setdefault(_ORDER, {})[name] = order
    del module._parameters[name]


def take_out(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Inverts ``put_in_place``; leaves nothing of it behind, the order of the parameters included."""
    delattr(module, name + SUFFIX)
    module.__class__ = class_with(module, sl_names(module))
    module._parameters[name] = parameter
    orders = vars(module)[_ORDER]
    order = orders.pop(name)
    for other in [other for other in order if other in module._parameters]:
        module._parameters[other] = module._parameters.pop(other)
    if not orders:
        del vars(module)[_ORDER]
