"""Fuzzing, at length: ``python -m tests.fuzz graphs --examples 10000 --seconds 540``, or ``files``.

Goes on where the last run ended, as ``counts.jsonl`` says, and adds a line to it: what was run, and what went wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

COUNTS = Path(__file__).with_name("counts.jsonl")
Batch = Callable[[int, dict[str, Any]], None]
"""Runs the examples from a number on, and counts them in a dict."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", choices=("graphs", "files"))
    parser.add_argument("--examples", type=int, default=10_000, help="run until so many were run in all")
    parser.add_argument("--seconds", type=float, default=540, help="begin no batch after so long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # one line for each model that is converted, or is not
    warnings.simplefilter("ignore")
    if args.what == "graphs":
        from tests.fuzz.graphs import batch
    else:
        from tests.fuzz.files import batch
    earlier = [json.loads(line) for line in COUNTS.read_text().splitlines()] if COUNTS.exists() else []
    first = sum(each["examples"] for each in earlier if each["what"] == args.what)
    counts: dict[str, Any] = {"what": args.what, **where(), "first": first, "examples": 0, "seconds": 0, "wrong": []}
    begin = time.perf_counter()
    for done in numbers(args.examples - first, args.seconds):
        batch(first + done, counts)
        counts["seconds"] = round(time.perf_counter() - begin)
        COUNTS.write_text("".join(json.dumps(each) + "\n" for each in [*earlier, counts]))
        if done % 500 == 0:
            print(json.dumps({**counts, "wrong": len(counts["wrong"])}), flush=True)
    for each in counts["wrong"]:
        print(json.dumps(each))
    print(json.dumps({**counts, "wrong": len(counts["wrong"])}))
    return 1 if counts["wrong"] else 0


BATCH = 50


def numbers(examples: int, seconds: float) -> Iterator[int]:
    """Yields how many examples were run before each batch, until there are enough or it was long enough."""
    begin = time.monotonic()
    for done in range(0, examples, BATCH):
        if time.monotonic() - begin > seconds:
            return
        yield done


def where() -> dict[str, str]:
    """Returns date, commit and versions."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    python = ".".join(map(str, sys.version_info[:3]))
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.strip(), "torch": torch.__version__, "python": python}


if __name__ == "__main__":
    sys.exit(main())
