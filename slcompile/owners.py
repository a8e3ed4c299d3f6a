"""Which modules own a parameter, what it is called, and what else holds it: found by looking at live objects."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

_TRANSPARENT = ("_orig_mod",)  # torch.compile's wrapper: its child is the model itself


@dataclass
class LiveObjects:
    """Every module and optimizer of the process, from one walk over the garbage collector's objects."""

    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    parents: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)
    names: dict[int, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def find(cls) -> LiveObjects:
        live = cls()
        for thing in gc.get_objects():
            kind = type(thing)  # not isinstance: it would run the __class__ of lazy proxies
            if issubclass(kind, nn.Module) and "_modules" in thing.__dict__:
                live.modules.append(thing)
            elif issubclass(kind, Optimizer) and "param_groups" in thing.__dict__:
                live.optimizers.append(thing)
        for module in live.modules:
            for name, child in module._modules.items():
                if child is not None and name not in _TRANSPARENT:
                    live.parents.setdefault(id(child), (module, name))
        return live

    def owners(self, parameters: Iterable[Tensor]) -> dict[int, list[tuple[nn.Module, str]]]:
        """id of a parameter -> the (module, attribute) pairs that hold it in ``_parameters``."""
        wanted: dict[int, list[tuple[nn.Module, str]]] = {id(parameter): [] for parameter in parameters}
        for module in self.modules:
            for name, parameter in module._parameters.items():
                if id(parameter) in wanted:
                    wanted[id(parameter)].append((module, name))
        return wanted

    def ancestors(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """From the module itself up to its outermost container: (module, its name in the next one)."""
        chain, seen = [], set()
        while id(module) not in seen:
            seen.add(id(module))
            parent, name = self.parents.get(id(module), (None, ""))
            chain.append((module, name))
            if parent is None:
                break
            module = parent
        return chain

    def root(self, module: nn.Module) -> nn.Module:
        """The outermost container of a module."""
        return self.ancestors(module)[-1][0]

    def roots(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        """The outermost containers of the modules that own these parameters."""
        pairs = [pair for owners in self.owners(parameters).values() for pair in owners]
        return list({id(root): root for module, _ in pairs for root in [self.root(module)]}.values())

    def name(self, parameter: Tensor, owner: nn.Module) -> str:
        """A parameter's name in ``named_parameters()`` of its owner's outermost container."""
        root = self.root(owner)
        if id(root) not in self.names:
            self.names[id(root)] = {id(value): name for name, value in root.named_parameters()}
        return self.names[id(root)][id(parameter)]


_known_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember_owners(parameter: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
    """Keeps a parameter's owners for ``in_training``, which runs at every call of a graph."""
    _known_owners[parameter] = [(weakref.ref(module), name) for module, name in owners]


def in_training(parameter: Tensor) -> bool:
    """Whether a parameter is owned by modules of which none is in ``.eval()``."""
    known = _known_owners.get(parameter)
    alive = [(reference(), name) for reference, name in known or ()]
    if not alive or any(module is None or module._parameters.get(name) is not parameter for module, name in alive):
        remember_owners(parameter, LiveObjects.find().owners([parameter])[id(parameter)])
        alive = [(reference(), name) for reference, name in _known_owners[parameter]]
    return bool(alive) and all(module.training for module, _ in alive)


def wrapper_of(module: nn.Module, parameter: Tensor, live: LiveObjects) -> str | None:
    """Name of the DDP or FSDP wrapper that already holds a parameter, if there is one."""
    for ancestor, _ in live.ancestors(module):
        for base in type(ancestor).__mro__:
            if base.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"):
                return base.__name__
    return "DTensor" if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "device_mesh") else None


def hooks_of(parameter: torch.Tensor) -> str | None:
    """What kind of hook is registered on a parameter, if there is any."""
    if parameter._backward_hooks:
        return "a gradient hook (register_hook)"
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "a post-accumulate-grad hook"
    return None
