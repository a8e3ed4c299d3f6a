"""What ``explain`` found: totals, a row for each matmul and each pass, the graphs; as text, JSON and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slcompile.inspect import text
from slcompile.inspect.document import Document
from slcompile.inspect.graph_diff import GraphDiff, Tables

ADAM = 4
"""Copies of each trained parameter in training: itself, its gradient and Adam's two states."""


@dataclass(frozen=True)
class Change:
    """A number of the dense model, and of the one that is trained."""

    before: float
    after: float


@dataclass(frozen=True)
class Summary:
    """Totals of a model.

    Attributes:
        replaced, total: Matmuls that read a parameter.
        parameters: Of the whole model.
        bytes: Of weights, gradients and Adam's two states, in the parameters' dtype.
        flops: Of a training step's matmuls that read a parameter.
    """

    replaced: int
    total: int
    parameters: Change
    bytes: Change
    flops: Change


@dataclass(frozen=True)
class MatmulRow:
    """What becomes of one matmul that reads a parameter.

    Attributes:
        name: The parameter's fully qualified name.
        shape: Of the parameter.
        tokens: Vectors that are multiplied with it, a number or a symbol; None where no graph shows the matmul.
        graph: Number of the captured graph; None likewise.
        decision: ``"replaced"`` or ``"left"``.
        reason: A fixed code where it is left, and ...
        detail: ... the same as a sentence.
        rank, density, nonzeros: Of the weight that takes its place.
        lowering: ``"composed"``, ``"factored"``, ``"mixed"``, or empty where there is none to choose.
        costs: Predicted seconds of each lowering, forward and backward.
        bytes: Of the weight, its gradient and Adam's states; those of a weight that is read twice stand in both rows.
        flops: Of a training step.
        source: Where the model's code calls for it.
        node: Id of its node in the captured graph.
    """

    name: str
    shape: tuple[int, ...]
    tokens: int | str | None
    graph: int | None
    decision: str
    reason: str
    detail: str
    rank: int | None
    density: float | None
    nonzeros: int | None
    lowering: str
    costs: Mapping[str, float]
    bytes: Change
    flops: Change
    source: str
    node: str


@dataclass(frozen=True)
class PassRow:
    """What one pass did to one graph.

    Attributes:
        graph: Number of the captured graph.
        stage: ``"captured"``, ``"joint"``, ``"forward"`` or ``"backward"``.
        name: Of the pass.
        seconds: That it took.
        changed: Whether the graph is another one than before.
        created, erased: Number of nodes.
        replaced, left: Number of candidates.
        diff: What changed, as text.
    """

    graph: int
    stage: str
    name: str
    seconds: float
    changed: bool
    created: int
    erased: int
    replaced: int
    left: int
    diff: str


@dataclass(frozen=True)
class Break:
    """Where Dynamo ended one graph and went on with the next, or gave a function up to Python, and why."""

    reason: str
    source: str


@dataclass(frozen=True)
class Explanation(Document):
    """What ``backend="sltrain"`` would do to a model; ``print`` it, or write it as JSON or as a page.

    Attributes:
        model: Name of its class.
        versions: Of slcompile and torch.
        config: The fields of the ``SLConfig``.
        summary: Totals.
        matmuls: A row for each matmul that reads a parameter.
        passes: A row for each pass on each graph, in order.
        breaks: Where the model fell into several graphs, or out of them.
        graphs: For each captured graph its stages, each before and after our passes: captured, joint (forward and
            backward in one), forward, backward.
    """

    SCHEMA = "slcompile.explain/3"

    model: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    summary: Summary
    matmuls: tuple[MatmulRow, ...]
    passes: tuple[PassRow, ...]
    breaks: tuple[Break, ...]
    graphs: tuple[GraphDiff, ...]

    def __str__(self) -> str:
        return text.render(self)

    def to_dict(self) -> dict[str, Any]:
        summary = dataclasses.asdict(self.summary)
        replaced, total = summary.pop("replaced"), summary.pop("total")
        tables = Tables()
        return {
            "schema": self.SCHEMA,
            "model": self.model,
            "versions": dict(self.versions),
            "config": {key: list(each) if isinstance(each, tuple) else each for key, each in self.config.items()},
            "summary": {"matmuls": {"replaced": replaced, "total": total}, **summary},
            "matmuls": [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.matmuls],
            "passes": [dataclasses.asdict(row) for row in self.passes],
            "breaks": [dataclasses.asdict(row) for row in self.breaks],
            "graphs": [each.graphs_to_dict(tables) for each in self.graphs],
            **tables.to_dict(),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Explanation:
        cls._require_schema(given)
        summary = given["summary"]
        changes = [Change(**summary[key]) for key in ("parameters", "bytes", "flops")]
        tables = Tables.from_dict(given)
        rows = [
            MatmulRow(**{**row, "shape": tuple(row["shape"])} | {key: Change(**row[key]) for key in ("bytes", "flops")})
            for row in given["matmuls"]
        ]
        return cls(
            given["model"],
            given["versions"],
            {key: tuple(each) if isinstance(each, list) else each for key, each in given["config"].items()},
            Summary(summary["matmuls"]["replaced"], summary["matmuls"]["total"], *changes),
            tuple(rows),
            tuple(PassRow(**row) for row in given["passes"]),
            tuple(Break(**row) for row in given["breaks"]),
            tuple(GraphDiff.graphs_from_dict(each, tables) for each in given["graphs"]),
        )
