"""What there is to know on a GPU, in one command: tests of compiled models, kernels, train steps, decoding, rates.

    python -m tests.gpu_day --out gpu-day

Parts run in processes of their own, and each result is kept as it comes: after ``--minutes`` the command ends, and
called again it goes on. Five calls of 9.5 minutes are enough. Written are ``results.json`` and ``page.md``.

The backend is found by the package's metadata: ``pip install --no-deps --no-build-isolation -e .``
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slcompile.files import writable_file, write_text
from tests.gpu_day.page import page
from tests.gpu_day.parts import ROOT, Part, Plan

SPARE = 5.0
"""Seconds that a call keeps for its last words."""

LIMIT = 3
"""A part is ended after so many times the time that it is expected to take."""

Runner = Callable[[Part, float], dict[str, Any]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, and refuses bad ones before any work is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="write the results into this folder")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from this results.json (default: that of --out)"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="end after so long (default: 9.5)")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="run only the parts whose names hold one of the words"
    )
    parser.add_argument("--again", action="store_true", help="run parts that failed once more")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small sizes")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if args.resume is not None and not args.resume.is_file():
        parser.error(f"--resume must be a results.json, got {args.resume}, which is no file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device got {args.device!r}: {str(error).partition(chr(10))[0]}")
    if "sltrain" not in torch.compiler.list_backends():
        parser.error("the backend is not installed: pip install --no-deps --no-build-isolation -e .")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """Returns the day's plan."""
    device = torch.device(args.device)
    return Plan.tiny(device) if args.tiny else Plan(device)


def in_child(args: argparse.Namespace) -> Runner:
    """Returns what runs a part in a process of its own, which is ended when its time is over."""

    def run(part: Part, seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "result.json")
            command = [sys.executable, "-m", "tests.gpu_day", "--device", args.device, "--part", part.name, str(file)]
            try:
                done = subprocess.run(
                    command + ["--tiny"] * args.tiny, cwd=ROOT, capture_output=True, text=True, timeout=seconds
                )
            except subprocess.TimeoutExpired:
                if seconds < LIMIT * part.seconds:
                    return {"status": "unfinished", "error": "the call ended; the next one begins it again"}
                return {"status": "failed", "error": f"it took more than {seconds:.0f} s"}
            if not file.exists():
                return {"status": "failed", "error": (done.stderr or done.stdout)[-4000:]}
            return {"status": "done", "result": json.loads(file.read_text())}

    return run


def go_on(parts: list[Part], results: dict[str, Any], args: argparse.Namespace, run: Runner) -> None:
    """Runs the parts that are left, as long as there is time for one."""
    end = time.monotonic() + 60 * args.minutes - SPARE
    results["planned"] = [part.name for part in parts]
    for part in parts:
        before = results["parts"].get(part.name, {"status": "unfinished"})["status"]
        if before == "done" or (before == "failed" and not args.again):
            continue
        if args.only and not any(word in part.name for word in args.only):
            continue
        begin = time.monotonic()
        if end - begin < part.seconds:
            continue  # a shorter one may still fit
        found = run(part, min(end - begin, LIMIT * part.seconds))
        results["parts"][part.name] = {**found, "seconds": time.monotonic() - begin}
        print(f"{found['status']:7} {time.monotonic() - begin:6.0f} s  {part.name}", flush=True)
        keep(results, args.out)


def keep(results: dict[str, Any], folder: Path) -> None:
    """Writes the results and their page."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "page.md", page(results))


def main(argv: list[str] | None = None, runner: Runner | None = None) -> int:
    """Runs what is left; returns 0 where nothing is, 3 where another call has to go on."""
    args = parse_args(argv)
    parts = plan_of(args).parts()
    if args.part is not None:
        name, file = args.part
        (part,) = (each for each in parts if each.name == name)
        try:
            result = part.run()
        except Exception:
            traceback.print_exc()
            return 1
        Path(file).write_text(json.dumps(result))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    writable_file(args.out / "page.md")  # before the work, not after it
    source = args.resume or args.out / "results.json"
    results = json.loads(source.read_text()) if source.exists() else {"parts": {}}
    go_on(parts, results, args, runner or in_child(args))
    keep(results, args.out)
    states = [results["parts"].get(part.name, {"status": "unfinished"})["status"] for part in parts]
    left = states.count("unfinished")
    counts = ", ".join(f"{states.count(each)} {each}" for each in ("done", "failed", "unfinished"))
    print(f"{len(parts)} parts: {counts}; {args.out / 'page.md'}")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
