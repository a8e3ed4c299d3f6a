"""README is kept true: its commands are those that CI runs, its example runs, its table is SLConfig's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import slcompile
from tests.testing import some_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command():
    (command,) = re.findall(r"^python3 -m venv .* (pip install .*pytest.*)$", README, flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "outcome"), some_of([("true", "1 error"), ("", "1 skipped")], [("true", "1 error")]))
def test_ci_skips_no_browser_test(tmp_path, ci, outcome):
    # A PATH without a browser. The test that is chosen is one of those that need it.
    arguments = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "in_a_frame",
        "tests/inspect/test_page.py",
    ]
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ci}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome in done.stdout, done.stdout + done.stderr
    assert done.returncode == (1 if ci else 0)
    assert "apt install chromium" in done.stdout


def test_ci_installs_a_browser():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("export CI=true") < script.index("apt-get install") < script.index("pytest")


@pytest.mark.slow
def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"run by tests/test_readme.py -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^\w+: 2 \w+, 0 left$", printed, flags=re.MULTILINE)
    assert "model.onnx: opset" in printed
    assert (tmp_path / "model.onnx").exists()


def test_the_options_table_is_the_config():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, flags=re.MULTILINE))
    assert rows.pop("inductor") == "{}"
    defaults = {field.name: str(field.default).replace("'", '"') for field in fields(slcompile.SLConfig)}
    rows = {name: value.strip('"') if value.startswith('"') else value for name, value in rows.items()}
    assert rows == defaults


def test_it_is_short():
    assert len(README.splitlines()) <= 150
