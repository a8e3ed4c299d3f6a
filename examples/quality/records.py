"""The runs' log: a JSON line a run, appended when it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.quality.settings import Settings

RUNS = Path(__file__).with_name("runs.jsonl")
READ = ("text", "tokens", "parameters", "projections", "diverged", "curve")
"""What is read of a record beside its settings and losses."""


class Records:
    """The runs that a file holds, found by their settings and their text.

    Raises:
        ValueError: A line is not a run; the message has its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            key, record = _read(line, f"line {number} of {path}")
            self._found[key] = record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._found.values())

    def find(self, settings: Settings, text: str) -> dict[str, Any] | None:
        """The run with these settings on the text of this hash, if it was made."""
        return self._found.get(_key(settings, text))

    def add(self, record: dict[str, Any]) -> None:
        """Appends a run to the file, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[_key(Settings.of(record), record["text"])] = record


def _read(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError("it is no JSON object")
        if missing := [name for name in READ if name not in record]:
            raise KeyError(*missing)
        return _key(Settings.of(record), record["text"]), record
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not a run: {error!r}") from error


def _key(settings: Settings, text: str) -> str:
    return json.dumps({**settings.deciding(), "text": text}, sort_keys=True)
