"""``python -m tests.sweep``: every architecture, a row each; or those of the names or families that are given."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from slcompile.config import did_you_mean
from tests.sweep.architectures import ARCHITECTURES
from tests.sweep.measure import ATEN, CPP, LOWERINGS, Row, first_line, measure

HEADER = (
    f"{'architecture':30} {'family':15} {'graphs':>6} {'matmuls':>7} {'replaced':>8} {'share':>6}  {'loss':>5} "
    f"{'grads':>5} {'merged':>7}  {'ONNX':7} {'s':>4}  left dense"
)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 if an architecture fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    families = sorted({each.family for each in ARCHITECTURES.values()})
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"architectures, or of {', '.join(families)}; default: all"
    )
    parser.add_argument(
        "--inductor", choices=["aten", "cpp"], default="aten", help="aten: without C++, ten times as fast"
    )
    parser.add_argument(
        "--lowering", action="append", choices=LOWERINGS, help="compare gradients under it; default: all"
    )
    parser.add_argument("--no-onnx", action="store_true", help="do not export")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="JSON lines: added to, and what is there is not measured again"
    )
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds for one architecture (900)")
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in ARCHITECTURES and name not in families:
            parser.error(f"unknown architecture {name!r}{did_you_mean(name, [*ARCHITECTURES, *families])}")
    chosen = [name for name, each in ARCHITECTURES.items() if not given.names or {name, each.family} & set(given.names)]
    known = read_results(given.results)
    prepare()
    print(HEADER, flush=True)
    rows = []
    for name in chosen:
        row = known.get(name)
        if row is None:
            settings = {"inductor": CPP if given.inductor == "cpp" else ATEN, "export": not given.no_onnx}
            row = in_child(name, given.timeout, lowerings=tuple(given.lowering or LOWERINGS), **settings)
            if given.results is not None:
                with given.results.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
        print(line(row), flush=True)
    print("\n".join(totals(rows)))
    return int(any(row.failures for row in rows))


@torch.no_grad()
def prepare() -> None:
    """What each child would do first: imports, the patterns of Inductor's passes. No autograd: it refuses forks."""
    torch.compile(torch.nn.Linear(32, 32), options=dict(ATEN))(torch.randn(2, 32))


def in_child(name: str, timeout: float, **settings: Any) -> Row:
    """Measures an architecture in a process of its own, whose crash or hanging is a failure like another."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, name, settings))
    child.start()
    sender.close()
    row = Row(name, ARCHITECTURES[name].family)
    if not connection.wait([receiver], timeout):
        row.failures.append(f"not done in {timeout:.0f} s")
    else:
        try:
            row = receiver.recv()
        except EOFError:
            child.join()
            row.failures.append(f"the process ended with {child.exitcode}")
    child.kill()
    child.join()
    return row


def _send(sender: Any, name: str, settings: dict[str, Any]) -> None:
    # No pool, of threads or of compilers, outlives a fork.
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        row = measure(name, **settings)
    except Exception as error:
        if os.environ.get("SWEEP_TRACEBACK"):
            traceback.print_exc()
        row = Row(name, ARCHITECTURES[name].family, failures=[first_line(error)])
    sender.send(row)


def read_results(file: Path | None) -> dict[str, Row]:
    """Rows of an earlier run, the last one of each architecture, without those that failed."""
    if file is None or not file.exists():
        return {}
    rows = [Row(**json.loads(text)) for text in file.read_text().splitlines()]
    return {row.name: row for row in rows if not row.failures}


def line(row: Row) -> str:
    """A row of the table, and a line for whatever is to be seen by eye."""
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(row.left.items()))
    grads = max(row.gradients.values(), default=0.0)
    onnx = row.onnx.split(":")[0] if row.onnx else "-"
    text = (
        f"{row.name:30} {row.family:15} {row.graphs:6} {row.matmuls:7} {row.replaced:8} {row.share:6.0%}  "
        f"{row.loss:5.2f} {grads:5.2f} {row.merged:7.0e}  {onnx:7} {row.seconds:4.0f}  {left}"
    )
    notes = [*row.details, *([row.onnx] if ":" in row.onnx else []), *(f"FAILED: {each}" for each in row.failures)]
    return "\n".join([text.rstrip(), *(f"    {each}" for each in notes)])


def totals(rows: list[Row]) -> list[str]:
    """What the table comes to."""
    failed = [row.name for row in rows if row.failures]
    exported = [row.name for row in rows if row.onnx[:1].isdigit()]
    cannot = [row.name for row in rows if ":" in row.onnx]
    matmuls, replaced = sum(row.matmuls for row in rows), sum(row.replaced for row in rows)
    return [
        f"{len(rows)} architectures, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}",
        f"{replaced} of {matmuls} matmuls replaced; {sum(row.graphs == 1 for row in rows)} captured as one graph",
        f"ONNX: {len(exported)} exported and verified, {len(cannot)} that torch or onnxruntime cannot",
    ]


if __name__ == "__main__":
    sys.exit(main())
