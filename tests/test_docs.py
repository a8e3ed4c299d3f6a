"""The documentation is kept true: it builds without a warning, and names what there is in the sources."""

from __future__ import annotations

import ast
import html
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import slcompile
from slcompile.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*sorted((ROOT / "slcompile").rglob("*.py")), *sorted((ROOT / "passes").rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[str]:
    """The code blocks of a page, those inside lists and tables too."""
    for found in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        yield textwrap.dedent(found[2])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert loaded == [], page


def test_the_api_pages_show_every_public_name(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    headings = set(re.findall(r"<h2 id=\"slcompile\.(?:\w+\.)*(\w+)\"", pages))
    names = {name for name in slcompile.__all__ if not inspect.ismodule(getattr(slcompile, name))}
    assert {*names, "per_layer"} - headings == set()


def test_the_layout_names_every_module(site):
    layout = text_of(site / "layout" / "index.html")
    rows = set(re.findall(r"^\s*(\w+\.py)\s*$", layout, flags=re.MULTILINE))
    assert {file.name for file in SOURCES} - rows == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_is_python(page):
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_pages_have_their_options(page, capsys):
    for code in blocks(page, "bash"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["slcompile"]:
                continue
            with pytest.raises(SystemExit) as ended:
                main([words[1], "--help"])
            assert ended.value.code == 0, line
            known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert {word for word in words if word.startswith("--")} <= known, line


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_environment_variable_is_documented():
    used = {name for file in SOURCES for name in re.findall(r"\bSLCOMPILE_\w+", file.read_text())}
    assert used
    assert used - set(re.findall(r"`(SLCOMPILE_\w+)`", (ROOT / "docs" / "process.md").read_text())) == set()


def test_every_reason_of_the_policy_is_documented():
    (policy,) = (ROOT / "slcompile").rglob("eligibility.py")
    returned = [node.value for node in ast.walk(ast.parse(policy.read_text())) if isinstance(node, ast.Return)]
    first = [value.elts[0] for value in returned if isinstance(value, ast.Tuple) and len(value.elts) == 2]
    codes = {each.value for each in first if isinstance(each, ast.Constant) and each.value}
    assert len(codes) > 8
    assert (
        codes - set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "options.md").read_text(), flags=re.MULTILINE))
        == set()
    )


def test_pages_that_the_sources_mention_exist():
    mentioned = {path for file in SOURCES for path in re.findall(r"\b[\w/]+\.md\b", file.read_text())}
    assert [path for path in mentioned if not (ROOT / path).exists()] == []


HOW_TOS = """
import howto_op, howto_pass, howto_structure, slcompile, torch
D = torch.randn(3, 4, 5)
assert torch.equal(howto_op.block_diagonal(D), howto_op.block_diagonal_reference(D))
torch.library.opcheck(howto_op.block_diagonal, (D,))
assert howto_pass.verb_noun(torch.fx.symbolic_trace(torch.nn.ReLU())).replaced == []
model, x = torch.nn.Sequential(torch.nn.Linear(64, 96)), torch.randn(8, 64)
slcompile.factorize_(model, slcompile.SLConfig(structure="diagonal_low_rank", rank=8))
model(x).square().sum().backward()
assert all(each.grad is not None for each in model.parameters())
before = model(x)
slcompile.merge_(model)
torch.testing.assert_close(model(x), before)
"""


@pytest.mark.slow
def test_the_code_of_the_how_tos_works(tmp_path):
    for page in ("op", "pass", "structure"):  # in a process of its own: what is registered stays
        code = next(blocks(ROOT / "docs" / "howto" / f"{page}.md", "python"))
        (tmp_path / f"howto_{page}.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", HOW_TOS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
