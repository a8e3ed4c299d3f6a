"""Writes the page of the layout when mkdocs builds it: the first line of each file's docstring, by folder.

The sources are read and not imported, so that building the documentation needs no torch.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "<!-- layout -->"


def on_page_markdown(markdown: str, **context: Any) -> str:
    """What mkdocs calls for each page; the mark in one of them becomes the tables."""
    return markdown.replace(MARK, "\n".join(tables())) if MARK in markdown else markdown


def tables() -> list[str]:
    """Lines of Markdown: a section for each folder of Python files, with a row for each file."""
    lines = []
    for top in ("passes", "slcompile"):
        folders = [ROOT / top, *sorted(path for path in (ROOT / top).rglob("*") if path.is_dir())]
        for folder in folders:
            files = sorted(folder.glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name))
            if not files or any(path.is_symlink() for path in (folder, *folder.parents) if path.is_relative_to(ROOT)):
                continue
            name = folder.relative_to(ROOT).as_posix()
            lines += [f"## {name}", "", "| | |", "|---|---|"]
            lines += [f"| `{file.name}` | {summary(file)} |" for file in files]
            lines.append("")
    return lines


def summary(file: Path) -> str:
    """The first line of a file's docstring, as text that a table can hold.

    Raises:
        ValueError: The file has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring, which the page of the layout shows")
    return docstring.partition("\n")[0].replace("``", "`").replace("|", r"\|").replace("*", r"\*")
