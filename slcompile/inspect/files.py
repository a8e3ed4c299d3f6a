"""Documents of this package as files: JSON and pages, written beside their target and moved into place."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slcompile.export.files import beside, move_into_place, writable_file


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Writes a document as JSON; ValueError where ``path`` cannot be written."""
    return _write(path, json.dumps(document, ensure_ascii=False, allow_nan=False))


def write_html(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Writes the page of a document; ValueError where ``path`` cannot be written."""
    from slcompile.inspect.page import render

    return _write(path, render(document))


def frame(document: Mapping[str, Any]) -> str:
    """The page of a document for a notebook's cell, in a frame of its own: its style and script touch nothing else."""
    from slcompile.inspect.page import render

    style = "width: 100%; height: 720px; border: 0"
    return f'<iframe style="{style}" sandbox="allow-scripts" srcdoc="{html.escape(render(document))}"></iframe>'


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a document.

    Raises:
        ValueError: The file holds no JSON object.
        OSError: It cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} holds no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def require_schema(document: Mapping[str, Any], schema: str) -> None:
    """Raises ValueError where a document has another schema."""
    if document.get("schema") != schema:
        raise ValueError(f"schema must be {schema!r}, got {document.get('schema')!r}")


def _write(path: str | os.PathLike[str], text: str) -> Path:
    target = writable_file(path)
    with beside(target) as scratch:
        (scratch / target.name).write_text(text, encoding="utf-8")
        move_into_place(scratch, target.parent, last=target.name)
    return target
