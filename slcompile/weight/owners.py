"""Which modules own a parameter, what it is called, and what else holds it: found by looking at live objects."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from slcompile import torch_private
from slcompile.names import plain_name


@dataclass
class LiveObjects:
    """Every module and optimizer of the process, from one walk over the garbage collector's objects."""

    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    parents: dict[int, list[nn.Module]] = field(default_factory=dict)
    _names: dict[int, dict[int, list[str]]] = field(default_factory=dict)

    @classmethod
    def find(cls) -> LiveObjects:
        """Walks over the garbage collector's objects."""
        live = cls()
        for thing in gc.get_objects():
            kind = type(thing)  # not isinstance: it would run the __class__ of lazy proxies
            if issubclass(kind, nn.Module) and "_modules" in thing.__dict__:
                live.modules.append(thing)
            elif issubclass(kind, Optimizer) and "param_groups" in thing.__dict__:
                live.optimizers.append(thing)
        for module in live.modules:
            for child in module._modules.copy().values():  # another thread may be building its own model
                if child is not None:
                    live.parents.setdefault(id(child), []).append(module)
        return live

    def owners(self, parameters: Iterable[Tensor]) -> dict[int, list[tuple[nn.Module, str]]]:
        """Returns the (module, attribute) pairs that hold each parameter in ``_parameters``, by the parameter's id."""
        return owners_among(self.modules, parameters)

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """Returns the module itself and everything that contains it."""
        found, waiting = {id(module): module}, [module]
        while waiting:
            for parent in self.parents.get(id(waiting.pop()), []):
                if id(parent) not in found:
                    found[id(parent)] = parent
                    waiting.append(parent)
        return list(found.values())

    def root(self, module: nn.Module) -> nn.Module:
        """Returns the outermost container of a module, without wrappers.

        Of several (a list of layers made for convenience, beside the model) it is the one with the most parameters,
        then the one in which the module's own come first by name: whatever order they were made in.
        """
        tops = [each for each in self.ancestors(module) if not self.parents.get(id(each))]
        tops = [torch_private.without_wrappers(each) for each in tops]
        inside = [id(each) for each in module.parameters()]

        def preference(top: nn.Module) -> tuple[int, list[str]]:
            names = self.names(top)
            return -len(names), [min(names[each]) for each in inside if each in names]

        return min(tops, key=preference) if tops else module

    def roots(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        """Returns the outermost containers of the modules that own these parameters."""
        pairs = [pair for owners in self.owners(parameters).values() for pair in owners]
        return list({id(root): root for module, _ in pairs for root in [self.root(module)]}.values())

    def names(self, root: nn.Module) -> dict[int, list[str]]:
        """Returns the names of each parameter of a container, the usual one first, by the parameter's id."""
        if id(root) not in self._names:
            names: dict[int, list[str]] = {}
            for name, parameter in root.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), []).append(plain_name(name))
            self._names[id(root)] = names
        return self._names[id(root)]


def owners_among(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns the (module, attribute) pairs among these modules that hold each parameter, by the parameter's id."""
    wanted: dict[int, list[tuple[nn.Module, str]]] = {id(parameter): [] for parameter in parameters}
    for module in modules:
        for name, parameter in module._parameters.copy().items():  # as above
            if id(parameter) in wanted:
                wanted[id(parameter)].append((module, name))
    return wanted


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")


def data_parallel_wrappers(modules: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Returns those of some modules that are wrappers of DDP, FSDP or FSDP2, and the names of these."""
    kinds = (
        (next((base.__name__ for base in type(each).__mro__ if base.__name__ in _WRAPPERS), ""), each)
        for each in modules
    )
    return [(kind, each) for kind, each in kinds if kind]


def wrapper_of(ancestors: Iterable[nn.Module], parameter: Tensor) -> str | None:
    """Returns name of the DDP or FSDP wrapper that already holds a parameter, if there is one."""
    for kind, _ in data_parallel_wrappers(ancestors):
        return kind
    return type(parameter.data).__name__ if type(parameter.data) is not Tensor else None
