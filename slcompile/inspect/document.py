"""Documents of inspection as files: JSON and pages, written beside their target and moved into place."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from slcompile.files import write_text
from slcompile.inspect.page import render


class Document:
    """What can be written as JSON, and read again, or as a page: an explanation, a graph diff.

    Attributes:
        SCHEMA: Name and version of its JSON, see docs/schema.md.
    """

    SCHEMA: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON holds it; ``"schema"`` is among it."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Inverts ``to_dict``.

        Raises:
            ValueError: It has another schema.
        """
        raise NotImplementedError

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file, moved into place when it is whole; returns its absolute path.

        Raises:
            ValueError: ``path`` cannot be written.
        """
        return write_text(path, json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":")))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: It is no such file.
            OSError: It cannot be read.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(given).__name__}")
        return cls.from_dict(given)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained page; returns its absolute path.

        Raises:
            ValueError: ``path`` cannot be written.
        """
        return write_text(path, self._page())

    def _repr_html_(self) -> str:
        """Returns the page for a notebook's cell, in a frame of its own: its style and script touch nothing else."""
        style = "width: 100%; height: 720px; border: 0"
        return f'<iframe style="{style}" sandbox="allow-scripts" srcdoc="{html.escape(self._page())}"></iframe>'

    def _page(self) -> str:
        return render(self.to_dict())

    @classmethod
    def _require_schema(cls, given: Mapping[str, Any]) -> None:
        if given.get("schema") != cls.SCHEMA:
            raise ValueError(f"schema must be {cls.SCHEMA!r}, got {given.get('schema')!r}")
