"""Fills two pages when mkdocs builds them: the layout, from the files' docstrings, and the order of the passes.

The sources are read and not imported, so that building the documentation needs no torch.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Replaces the two marks, in the pages that have them; mkdocs calls it for each page."""
    if "<!-- layout -->" in markdown:
        markdown = markdown.replace("<!-- layout -->", "\n".join(tables()))
    if "<!-- passes -->" in markdown:
        markdown = markdown.replace("<!-- passes -->", f"```text\n{docstring(ROOT / 'passes' / '__init__.py')}\n```")
    return markdown


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
    """The first line of a file's docstring, as text that a table can hold."""
    return docstring(file).partition("\n")[0].replace("``", "`").replace("|", r"\|").replace("*", r"\*")


def docstring(file: Path) -> str:
    """A file's docstring.

    Raises:
        ValueError: It has none.
    """
    found = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not found:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring, which the page of the layout shows")
    return found
