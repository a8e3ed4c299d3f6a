"""What ``explain`` found: totals, a row for each matmul and each pass, the graphs; as text, JSON and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from slcompile.inspect import schemas, text
from slcompile.inspect.document import Document
from slcompile.inspect.graph_diff import GraphDiff
from slcompile.inspect.nodes import Tables
from slcompile.inspect.rows import Break, Change, MatmulRow, PassRow, Summary


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

    SCHEMA = schemas.EXPLANATION

    model: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    summary: Summary
    matmuls: tuple[MatmulRow, ...]
    passes: tuple[PassRow, ...]
    breaks: tuple[Break, ...]
    graphs: tuple[GraphDiff, ...]

    def __str__(self) -> str:
        captured = sum(each.name.endswith(", captured") for each in self.graphs)
        return text.render(self.model, self.summary, self.matmuls, self.passes, self.breaks, captured)

    @override
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
    @override
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
