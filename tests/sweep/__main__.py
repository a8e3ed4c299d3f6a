"""``python -m tests.sweep``: every architecture, a row each; or those of the names or families that are given."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from slcompile.config import LOWERINGS, did_you_mean
from tests.sweep.cases import CASES, Case
from tests.sweep.compare import compare
from tests.sweep.measure import measure
from tests.sweep.running import CPP, first_line
from tests.sweep.table import HEADER, PARTS, Part, add_result, line_of, part_of, read_results, totals, write_table

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 if an architecture fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    families = sorted({each.family for each in CASES.values()})
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"architectures, or of {', '.join(families)}; default: all"
    )
    parser.add_argument("--part", choices=list(PARTS), help="default: both")
    parser.add_argument("--code", action="store_true", help="make C++ of the training graphs, ten times as slow")
    parser.add_argument(
        "--lowering", action="append", choices=LOWERINGS, help="compare gradients under it; default: all"
    )
    parser.add_argument("--no-onnx", action="store_true", help="do not export")
    parser.add_argument("--no-code", action="store_true", help="compare inference without C++")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="JSON lines: added to, and what is there is not measured again"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write all results as the last code block of it")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds for one architecture (900)")
    parser.add_argument("--minutes", type=float, default=1e9, metavar="M", help="begin nothing new after this long")
    given = parser.parse_args(arguments)
    if given.table is not None and given.results is None:
        parser.error("--table is written from --results")
    for name in given.names:
        if name not in CASES and name not in families:
            parser.error(f"unknown architecture {name!r}{did_you_mean(name, [*CASES, *families])}")
    chosen = {name: each for name, each in CASES.items() if not given.names or {name, each.family} & set(given.names)}
    settings: dict[str, dict[str, Any]] = {
        "training": {
            "code": given.code,
            "export": not given.no_onnx,
            "lowerings": tuple(given.lowering or LOWERINGS),
        },
        "inference": {"code": not given.no_code},
    }
    parts = [given.part] if given.part else list(PARTS)
    found = run_all(given, in_turns(chosen), {part: settings[part] for part in parts})
    if given.table is not None:
        write_table(given.table, read_results(given.results))
    print("\n".join(totals(found)))
    return int(any(each.failures for each in found))


def run_all(given: argparse.Namespace, names: list[str], settings: dict[str, dict[str, Any]]) -> list[Part]:
    """Measures what is not known yet, and prints and notes it; all of it that is known at the end."""
    known = read_results(given.results)
    about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit()}
    deadline = time.monotonic() + 60 * given.minutes
    prepare()
    print(HEADER, flush=True)
    found: list[Part] = []
    for name in names:
        of_name = []
        for part, how in settings.items():
            line = known.get((name, part))
            if line is None or line["failures"]:
                if time.monotonic() > deadline:
                    continue
                row = in_child(part, name, given.timeout, **how)
                if given.results is not None:
                    add_result(given.results, part, row, **about)
            else:
                row = part_of(line)
            of_name.append(row)
        if of_name:
            print(line_of(of_name), flush=True)
        found += of_name
    return found


def in_turns(chosen: Mapping[str, Case]) -> list[str]:
    """The names so that one of each family comes first, then the second ones: a part of the run has seen them all."""
    seen: Counter[str] = Counter()
    turns = {}
    for name, each in chosen.items():
        turns[name] = seen[each.family]
        seen[each.family] += 1
    return sorted(chosen, key=lambda name: turns[name])


def commit() -> str:
    """The commit that is measured, with a plus where files were changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "no commit"


@torch.no_grad()
def prepare() -> None:
    """What each child would do first: imports, the patterns of Inductor's passes. No autograd: it refuses forks."""
    torch.compile(torch.nn.Linear(32, 32), options=CPP)(torch.randn(2, 32))


def in_child(part: str, name: str, timeout: float, **settings: Any) -> Part:
    """Measures an architecture in a process of its own, whose crash or hanging is a failure like another."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, part, name, settings))
    child.start()
    sender.close()
    row: Part = PARTS[part](name, CASES[name].family)
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


def _send(sender: Any, part: str, name: str, settings: dict[str, Any]) -> None:
    # No pool, of threads or of compilers, outlives a fork.
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        row: Part = {"training": measure, "inference": compare}[part](name, **settings)
    except Exception as error:
        if os.environ.get("SWEEP_TRACEBACK"):
            traceback.print_exc()
        row = PARTS[part](name, CASES[name].family, failures=[first_line(error)])
    sender.send(row)


if __name__ == "__main__":
    sys.exit(main())
