"""What an estimate found, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slcompile.passes import BudgetReport
from slcompile.passes.liveness import PARTS, PROOF_LAYERS


@dataclass(frozen=True)
class Usage:
    """What one variant of a model takes in a training step; bytes throughout.

    Attributes:
        parameter_count: Numbers that are trained.
        largest: The most that each of ``PARTS`` takes at any time in the step.
        peak: The most that is allocated at one time.
        place: Where that is.
        at_peak: What each of ``PARTS`` takes then; the sum is ``peak``.
        places: The most that is allocated in each place, in the order of the step.
    """

    parameter_count: int
    largest: Mapping[str, int]
    peak: int
    place: str
    at_peak: Mapping[str, int]
    places: Mapping[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """What training takes: with sparse-plus-low-rank weights, with low-rank ones, and dense.

    Attributes:
        sltrain: With the given config.
        low_rank: With B and A alone: the same graphs without values, their positions, gradients and state.
        dense: The model as it is, under Inductor.
        layers: Layers of the model; None where it was not made from a configuration.
        captured_layers: Layers of the deepest graphs that were made; the others repeat the middle one.
        settings: What it was asked for.
        budget: What is computed again for a memory budget; None without one.
    """

    sltrain: Usage
    low_rank: Usage
    dense: Usage
    layers: int | None
    captured_layers: int | None
    settings: Mapping[str, Any]
    budget: BudgetReport | None = None

    @property
    def peak(self) -> int:
        """Most bytes allocated at one time in a step with sparse-plus-low-rank weights."""
        return self.sltrain.peak

    def variants(self) -> dict[str, Usage]:
        """Returns the three, by the names they have in tables."""
        return {"dense": self.dense, "low rank": self.low_rank, "sltrain": self.sltrain}

    def to_dict(self) -> dict[str, Any]:
        """Returns ``settings``, ``layers``, ``captured_layers``, ``variants`` and ``budget``, for JSON."""
        variants = {
            name: {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(usage).items()}
            for name, usage in self.variants().items()
        }
        captured = {"layers": self.layers, "captured_layers": self.captured_layers}
        budget = None if self.budget is None else self.budget.to_dict()
        return {"settings": dict(self.settings), **captured, "variants": variants, "budget": budget}

    def __str__(self) -> str:
        columns = list(self.variants().values())
        size, unit = (1e9, "GB") if self.dense.peak >= 1e10 else (1e6, "MB")

        def row(label: str, cells: Sequence[str]) -> str:
            return f"{label:<36}" + "".join(f"{cell:>16}" for cell in cells)

        def amounts(label: str, values: Sequence[int]) -> str:
            return row(label, [f"{value / size:,.2f}" for value in values])

        def parts(name: str, indent: str) -> list[str]:
            table = [(part, [getattr(each, name)[part] for each in columns]) for part in PARTS]
            return [amounts(indent + part, values) for part, values in table if max(values) >= size / 200]

        rule = "-" * 84
        lines = [", ".join(f"{key} {value}" for key, value in self.settings.items()), ""]
        lines += [row(unit, list(self.variants())), rule]
        lines.append(row("trained parameters (million)", [f"{each.parameter_count / 1e6:,.1f}" for each in columns]))
        lines += ["", "the most at any time", *parts("largest", "  "), rule]
        lines += [amounts("peak", [each.peak for each in columns]), *parts("at_peak", "  ")]
        lines.append(row("of dense", [f"{each.peak / self.dense.peak:.0%}" for each in columns]))
        lines += [rule, *(f"the peak of {name} is in: {each.place}" for name, each in self.variants().items())]
        if self.budget is not None:
            lines += [rule, str(self.budget), *(f"  {each.detail}" for each in self.budget.replaced)]
        if self.captured_layers != self.layers:
            lines.append(
                f"{PROOF_LAYERS} layers were captured and the middle one repeated for {self.layers}; for "
                f"{self.captured_layers} that gave what their own graphs gave, to the byte"
            )
        return "\n".join(lines)
