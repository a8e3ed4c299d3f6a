"""The command line: ``slcompile bench``, ``check``, ``compress``, ``diff``, ``export``, ``memory`` and more."""

from __future__ import annotations

import argparse
import sys

from slcompile.cli import bench, check, compress, diff, export, memory, rates, suggest

COMMANDS = (bench, check, compress, diff, export, memory, rates, suggest)
"""Modules with ``add(commands)``, which adds a parser, and ``run(args)``, which does what it parsed and may return
an exit code."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; errors that a user can mend are one line on stderr and exit code 2, Ctrl-C is one and 130."""
    parser = argparse.ArgumentParser(prog="slcompile", description="Inspect, estimate and export slcompile models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands).set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"slcompile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("slcompile: interrupted", file=sys.stderr)
        return 130  # as a shell says it of a program that SIGINT ended
