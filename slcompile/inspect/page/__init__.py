"""The page of inspection: one HTML file that holds its data, style and script, and asks no network for anything."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from slcompile.inspect import schemas

SCHEMAS = (schemas.EXPLANATION, schemas.GRAPH_DIFF)
# In the order in which they use each other.
SCRIPTS = (
    "dagre.min.js",
    "dom.js",
    "sections.js",
    "tree.js",
    "boxes.js",
    "view.js",
    "select.js",
    "find.js",
    "keys.js",
    "start.js",
)


def render(document: Mapping[str, Any]) -> str:
    """Returns the page that shows an explanation or a graph diff.

    Args:
        document: What ``Explanation.to_dict()`` or ``GraphDiff.to_dict()`` returns.

    Returns:
        Self-contained HTML.

    Raises:
        ValueError: The document's ``schema`` is another one, or it holds a number that JSON lacks (NaN, infinity).
        TypeError: It holds a value that is no JSON.
    """
    schema = document.get("schema")
    if schema not in SCHEMAS:
        raise ValueError(f"document must have one of the schemas {', '.join(SCHEMAS)}, got {schema!r}")
    parts = {
        "title": html.escape(f"slcompile: {document.get('model') or document.get('name')}"),
        "style": _read("page.css"),
        "data": _embedded(document),
        "scripts": "\n".join(f"<script>{_script(name)}</script>" for name in SCRIPTS),
    }
    # One pass over the template, so that no part is searched for the names of the others.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _embedded(document: Mapping[str, Any]) -> str:
    # A browser looks for tags inside a script element before anybody parses the JSON: "<" must not appear.
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _script(name: str) -> str:
    if not name.endswith(".min.js"):
        return _read(name)
    return f"/*\n{_read(name.replace('.min.js', '.LICENSE.txt'))}*/\n{_read(name)}"


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
