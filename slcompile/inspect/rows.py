"""The rows of an explanation: totals, a row for each matmul, each pass and each graph break."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        costs: Predicted seconds of each lowering, and of ``"mixed"`` where that is taken; forward and backward.
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
        recomputed: What the backward pass computes again because of it, beside composed weights; a line for each.
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
    recomputed: str = ""


@dataclass(frozen=True)
class Break:
    """Where Dynamo ended one graph and went on with the next, or gave a function up to Python, and why."""

    reason: str
    source: str
