"""The nodes of a compared graph, and the tables of what many of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

SIDES = ("before", "after")

ModuleStack = tuple[tuple[str, str], ...]
"""Path and class of the modules that a node belongs to, outermost first."""


class Node(NamedTuple):
    """A node of one of two compared graphs.

    Attributes:
        id: Unique in its graph.
        op: As in torch.fx (``"call_function"``, ``"placeholder"``, ...); ``"node"`` in ONNX graphs.
        target: What it calls.
        args: Its arguments as text.
        inputs: Ids of the nodes that it reads, in order; one that is read twice stands there twice.
        shape, dtype: Of its result, where known.
        module: Path and class of the modules that it belongs to, outermost first.
        status: ``"kept"``, ``"removed"``, ``"new"`` or ``"rewritten"``.
        origins: In the graph after: ids of the nodes before that it came from (``"from"`` in JSON).
        weight: Name of the parameter that it stands for.
        source: Where the model's code calls for it.
    """

    id: str
    op: str
    target: str
    args: str
    inputs: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""
    module: ModuleStack = ()
    status: str = ""
    origins: tuple[str, ...] = ()
    weight: str = ""
    source: str = ""

    def to_dict(self, tables: Tables) -> dict[str, Any]:
        """Returns it as JSON holds it; what nodes share goes into the document's tables."""
        given = {**self._asdict(), "from": list(self.origins), "inputs": list(self.inputs)}
        del given["origins"]
        shared = {"module": tables.modules.position(self.module), "source": tables.sources.position(self.source)}
        return given | shared

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], tables: Tables) -> Node:
        """Inverts ``to_dict``."""
        known = {key: each for key, each in given.items() if key != "from"}
        known |= {"inputs": tuple(given["inputs"]), "origins": tuple(given["from"])}
        shared = {"module": tables.modules.values[given["module"]], "source": tables.sources.values[given["source"]]}
        return cls(**{**known, **shared})


T = TypeVar("T")


class Table(Generic[T]):
    """Different values, and where each stands among them."""

    def __init__(self, values: Iterable[T] = ()) -> None:
        self.values = list(values)
        self._positions = {each: index for index, each in enumerate(self.values)}

    def position(self, value: T) -> int:
        """Returns where a value stands; it is added if it is not there yet."""
        if value not in self._positions:
            self._positions[value] = len(self.values)
            self.values.append(value)
        return self._positions[value]


@dataclass(frozen=True)
class Tables:
    """What the nodes of a document share: it is written once, and they hold positions."""

    modules: Table[ModuleStack] = field(default_factory=Table)
    sources: Table[str] = field(default_factory=Table)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON holds it."""
        stacks = [[list(each) for each in stack] for stack in self.modules.values]
        return {"modules": stacks, "sources": self.sources.values}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Tables:
        """Inverts ``to_dict``."""
        stacks = (tuple((path, kind) for path, kind in stack) for stack in given["modules"])
        return cls(Table(stacks), Table(given["sources"]))
