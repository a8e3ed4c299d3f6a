"""The table of the sweep, from the lines that it wrote as it went."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tests.sweep.cases import CASES
from tests.sweep.compare import Comparison, worst_of
from tests.sweep.measure import Row

PARTS: dict[str, type[Row] | type[Comparison]] = {"training": Row, "inference": Comparison}
"""What is measured of an architecture in one go; each is a line of the file of results."""

HEADER = (
    f"{'architecture':30} {'family':15} {'graphs':>6} {'matmuls':>7} {'replaced':>8} {'share':>6}  {'loss':>5} "
    f"{'grads':>5} {'bf16':>5} {'infer':>5} {'bf16':>5} {'cache':>5} {'merged':>7}  {'ONNX':7} {'s':>4}  left dense"
)

Results = dict[tuple[str, str], dict[str, Any]]
Part = Row | Comparison


def read_results(file: Path | None) -> Results:
    """The last line of each architecture and part."""
    if file is None or not file.exists():
        return {}
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    return {(line["name"], line["part"]): line for line in lines}


def add_result(file: Path, part: str, row: Part, **about: str) -> dict[str, Any]:
    """Adds a line, with what is known about the run; returns it."""
    line = {"part": part, **about, **asdict(row)}
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")
    return line


def part_of(line: Mapping[str, Any]) -> Part:
    """What a line holds."""
    made = PARTS[line["part"]]
    return made(**{each.name: line[each.name] for each in fields(made) if each.name in line})


def line_of(parts: Iterable[Part]) -> str:
    """A row of the table, and a line for whatever is to be seen by eye."""
    parts = list(parts)
    row = next((each for each in parts if isinstance(each, Row)), None)
    runs = next((each.runs for each in parts if isinstance(each, Comparison)), {})
    found = f"{'':6} {'':7} {'':8} {'':6}"
    numbers: list[float | None] = [None, None]
    merged, onnx, left = "", "", ""
    if row is not None:
        found = f"{row.graphs:6} {row.matmuls:7} {row.replaced:8} {row.share:6.0%}"
        numbers = [row.loss, max(row.gradients.values(), default=0.0)]
        merged, onnx = f"{row.merged:.0e}", row.onnx.split(":")[0] or "-"
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(row.left.items()))
    numbers += [
        worst_of(runs, ["training", "bfloat16"]),
        worst_of(runs, ["inference", "float32"]),
        worst_of(runs, ["inference", "bfloat16"]),
        worst_of(runs, ["generate"]),
    ]
    shares = " ".join("    -" if each is None else f"{each:5.2f}" for each in numbers)
    seconds = sum(each.seconds for each in parts)
    text = f"{parts[0].name:30} {parts[0].family:15} {found}  {shares} {merged:>7}  {onnx:7} {seconds:4.0f}  {left}"
    notes = [detail for each in parts for detail in shortened(each.details)]
    notes += [row.onnx] if row is not None and ":" in row.onnx else []
    notes += [f"FAILED: {failure}" for each in parts for failure in each.failures]
    return "\n".join([text.rstrip(), *(f"    {each}" for each in notes)])


SHOWN = 3
"""Of notes of one kind, how many are in the table; the file of results has all."""


def shortened(details: Sequence[str]) -> list[str]:
    """The notes; of those that excuse many numbers with the same words, the first ones."""
    by_excuse: dict[str, list[str]] = {}
    for each in details:
        by_excuse.setdefault(each.rpartition("; ")[2] if "is off by" in each else each, []).append(each)
    shown = []
    for same in by_excuse.values():
        shown += same[:SHOWN]
        shown += [f"... and {len(same) - SHOWN} more gradients"] if len(same) > SHOWN else []
    return shown


def totals(parts: Iterable[Part]) -> list[str]:
    """What the table comes to."""
    parts = list(parts)
    rows = [each for each in parts if isinstance(each, Row)]
    compared = [each for each in parts if isinstance(each, Comparison)]
    failed = list(dict.fromkeys(each.name for each in parts if each.failures))
    exported = [row.name for row in rows if row.onnx[:1].isdigit()]
    cannot = [row.name for row in rows if ":" in row.onnx]
    matmuls, replaced = sum(row.matmuls for row in rows), sum(row.replaced for row in rows)
    return [
        f"{len({each.name for each in parts})} architectures, {len(failed)} failed"
        f"{': ' + ', '.join(failed) if failed else ''}",
        f"training: {len(rows)}; {replaced} of {matmuls} matmuls replaced; "
        f"{sum(row.graphs == 1 for row in rows)} captured as one graph",
        f"inference: {len(compared)} in {sum(len(each.runs) for each in compared)} runs",
        f"ONNX: {len(exported)} exported and verified, {len(cannot)} that torch or onnxruntime cannot",
    ]


def write_table(document: Path, results: Results) -> None:
    """Puts the table in the place of the last code block of a document."""
    head, fence, _ = document.read_text().rpartition("\n```\n")[0].rpartition("\n```\n")
    assert fence, f"{document} has no table"
    lines, parts = [HEADER], []
    for name in CASES:
        found = [part_of(results[name, part]) for part in PARTS if (name, part) in results]
        parts += found
        lines += [line_of(found)] if found else []
    commits: dict[tuple[str, str, str], int] = {}
    for line in results.values():
        key = line["part"], line["date"], line["commit"]
        commits[key] = commits.get(key, 0) + 1
    runs = [f"{part}: {count} on {date} at {commit}" for (part, date, commit), count in sorted(commits.items())]
    table = "\n".join([*lines, *totals(parts), *runs])
    document.write_text(f"{head}\n```\n{table}\n```\n")
