"""An explanation as text for a terminal of 100 columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slcompile.inspect.rows import Break, Change, MatmulRow, PassRow, Summary

WIDTH = 100
_NAME = 24  # columns that a weight's name has at least


def render(
    model: str,
    summary: Summary,
    matmuls: Sequence[MatmulRow],
    passes: Sequence[PassRow],
    breaks: Sequence[Break],
    captured: int,
) -> str:
    """Shows totals, matmuls with equal layers folded, what was left and why, graph breaks, passes.

    Args:
        model: Name of its class.
        summary, matmuls, passes, breaks: What was found.
        captured: Number of captured graphs.
    """
    parts = [
        _header(model, summary),
        _matmuls(matmuls),
        _left(matmuls),
        _breaks(breaks, captured),
        _recomputed(passes),
        _passes(passes),
    ]
    return "\n\n".join(part for part in parts if part)


def _header(model: str, summary: Summary) -> str:
    lines = [f"{model}: {summary.replaced} of {summary.total} matmuls with a parameter replaced"]
    for title, change, unit in (
        ("parameters", summary.parameters, _thousands),
        ("weights + gradients + Adam", summary.bytes, _bytes),
        ("FLOPs of these matmuls, one step", summary.flops, _flops),
    ):
        ratio = f"  ({change.after / change.before:.2f}x)" if change.before else ""
        lines.append(f"  {title:<33} {unit(change.before):>14} -> {unit(change.after)}{ratio}")
    return "\n".join(lines)


def _matmuls(rows: Sequence[MatmulRow]) -> str:
    if not rows:
        return ""
    names = [("weight", "")]
    table = [["shape", "tokens", "decision", "rank", "lowering", "time", "bytes", "FLOPs"]]
    for row, count in _folded(rows):
        names.append((row.name, f" x{count}" if count > 1 else ""))
        table.append(
            [
                "x".join(map(str, row.shape)),
                "-" if row.tokens is None else str(row.tokens),
                "replaced" if row.decision == "replaced" else row.reason,
                "" if row.rank is None else str(row.rank),
                row.lowering,
                predicted(row),
                _ratio(row.bytes),
                _ratio(row.flops),
            ]
        )
    rest = _aligned(table).splitlines()
    room = max(_NAME, WIDTH - 2 - max(map(len, rest)))
    shown = [_shortened(name, room - len(times)) + times for name, times in names]
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in zip(shown, rest, strict=True))


def _left(rows: Sequence[MatmulRow]) -> str:
    """Returns one line for each reason that left a matmul dense, with its sentence."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.decision == "left":
            found[row.reason, row.detail] = found.get((row.reason, row.detail), 0) + 1
    lines = [f"  {number} {reason}: {detail}" for (reason, detail), number in found.items()]
    return "\n".join(["Left dense", *lines]) if lines else ""


def _breaks(breaks: Sequence[Break], captured: int) -> str:
    lines = [f"  {each.reason}\n    at {each.source}" for each in breaks]
    return "\n".join([f"Graph breaks ({captured} graph{'s' * (captured != 1)})", *lines]) if lines else ""


def _recomputed(rows: Sequence[PassRow]) -> str:
    """Returns what the backward pass computes again, equal layers folded."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for line in row.recomputed.splitlines():
            found.setdefault(re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", line), []).append(line)
    lines = [f"  {key} x{len(each)}" if len(each) > 1 else f"  {each[0]}" for key, each in found.items()]
    return "\n".join(["Computed again in the backward pass", *lines]) if lines else ""


def _passes(rows: Sequence[PassRow]) -> str:
    table = [["pass", "graph", "changed", "created", "erased", "replaced", "left", "ms"]]
    for row in rows:
        numbers = [row.created, row.erased, row.replaced, row.left]
        table.append(
            [
                row.name,
                f"{row.graph} {row.stage}",
                "yes" if row.changed else "no",
                *(str(number) for number in numbers),
                f"{1e3 * row.seconds:.1f}",
            ]
        )
    return _aligned(table)


def _folded(rows: Sequence[MatmulRow]) -> list[tuple[MatmulRow, int]]:
    """Folds rows that differ only in numbers of their names and in place: the first one's values, and how many."""
    groups: dict[Any, list[MatmulRow]] = {}
    for row in rows:
        key = (
            re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name),
            row.shape,
            str(row.tokens),
            row.reason,
            row.rank,
            row.lowering,
        )
        groups.setdefault((*key, row.bytes, row.flops, predicted(row)), []).append(row)
    folded = []
    for group in groups.values():
        first = group[0]
        if len(group) > 1:
            names = [row.name.split(".") for row in group]
            parts = [each[0] if len(set(each)) == 1 else "*" for each in zip(*names, strict=True)]
            first = replace(first, name=".".join(parts))
        folded.append((first, len(group)))
    return folded


def predicted(row: MatmulRow) -> str:
    """Returns the time of a matmul with the lowering that is taken."""
    if not row.costs:
        return ""
    milliseconds = 1e3 * row.costs[row.lowering]
    return f"{milliseconds:.2f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _ratio(change: Change) -> str:
    return f"{change.after / change.before:.2f}x" if change.before else "-"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Aligns a table: columns without content are left out, those of numbers are set to the right."""
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        right = all(re.fullmatch(r"(\d.*|-|)", cell) for cell in column[1:])
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _shortened(name: str, width: int) -> str:
    """Returns the end of a name, which tells weights apart."""
    return name if len(name) <= width else ".." + name[2 - width :]


def _thousands(number: float) -> str:
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def _flops(number: float) -> str:
    return _scaled(number, ("", "k", "M", "G", "T", "P", "E")).strip()


def _scaled(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} {units[-1]}"
