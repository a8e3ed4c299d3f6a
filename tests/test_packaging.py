"""The sdist and the wheel are built, the wheel is installed into an environment of its own, and works from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import slcompile

ROOT = Path(__file__).parent.parent
# What a build may read; whatever else it needed would be missing in a clean checkout's copy, too.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", "slcompile", "passes")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")

CONVERTS = """
import sys
from pathlib import Path

import torch

model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
dense = sum(each.numel() for each in model.parameters())
optimizer = torch.optim.AdamW(model.parameters())
assert "slcompile" not in sys.modules  # the string alone finds the backend
compiled = torch.compile(model, backend="sltrain", options={"rank": 8, "density": 0.05})
for _ in range(2):
    compiled(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

import slcompile

assert Path(slcompile.__file__).is_relative_to(sys.prefix), slcompile.__file__
assert Path(slcompile.passes.__file__).is_relative_to(sys.prefix), slcompile.passes.__file__
assert sorted(slcompile.factors(model)) == ["0.weight", "2.weight"]
assert sum(each.numel() for each in model.parameters()) < dense / 2
slcompile.explain(model, (torch.randn(8, 64),)).to_html("page.html")
"""


class Built(NamedTuple):
    """Names of the files of each, without the sdist's leading folder, and where they lie."""

    sdist: frozenset[str]
    wheel: frozenset[str]
    wheel_file: Path


def run(arguments: Sequence[str | Path], folder: Path) -> str:
    """Runs a program without a path to this checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(each) for each in arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel that is made from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, folder / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "made", "."], folder)
    (sdist,) = (folder / "made").glob("*.tar.gz")
    (wheel,) = (folder / "made").glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = frozenset(name.partition("/")[2] for name in archive.getnames())
        assert not [each.name for each in archive.getmembers() if each.issym()]
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = frozenset(archive.namelist())
    return Built(in_sdist, in_wheel, wheel)


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; torch and the rest are read from where this process has them."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel_file], folder.parent)
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A folder that a .pth file names has no .pth files of its own: an editable install that lies there is not seen.
    outer = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "outer.pth").write_text("".join(f"{each}\n" for each in outer))
    return folder


def package_files() -> set[str]:
    """What the package is made of in this checkout, with ``slcompile/passes`` followed."""
    roots = {"slcompile": ROOT / "slcompile", "slcompile/passes": ROOT / "passes"}
    return {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in roots.items()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_every_file_of_the_package_is_in(built, kind):
    needed = package_files()
    assert {"slcompile/py.typed", "slcompile/__main__.py", "slcompile/passes/find_matmuls.py"} <= needed
    assert len([name for name in needed if name.startswith("slcompile/inspect/page/")]) > 10
    assert needed - getattr(built, kind) == set()


def test_only_the_package_is_installed(built):
    (metadata,) = {name.partition("/")[0] for name in built.wheel} - {"slcompile"}
    assert metadata == f"slcompile-{slcompile.__version__}.dist-info"
    assert not [name for name in built.wheel if name.startswith("passes/")]


def test_licences_travel_with_it(built):
    licences = {"LICENSE", "THIRD_PARTY_NOTICES.md", "slcompile/inspect/page/dagre.LICENSE.txt"}
    assert licences <= built.sdist
    folder = f"slcompile-{slcompile.__version__}.dist-info"
    assert {f"{folder}/licenses/{name}" for name in licences} <= built.wheel
    with zipfile.ZipFile(built.wheel_file) as archive:
        metadata = archive.read(f"{folder}/METADATA").decode()
    assert re.search(r"^License-Expression: Apache-2.0 AND MIT$", metadata, flags=re.MULTILINE)
    assert re.search(rf"^Version: {re.escape(slcompile.__version__)}$", metadata, flags=re.MULTILINE)


def test_the_citation_names_the_same_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["license"] == "Apache-2.0"
    assert "version" not in citation  # it would be a second place for it


def test_the_notices_quote_the_vendored_licence():
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    licence = (ROOT / "slcompile" / "inspect" / "page" / "dagre.LICENSE.txt").read_text()
    assert licence.split() == notices[notices.index("> Copyright") :].replace(">", "").split()
    vendored = {file.name for file in (ROOT / "slcompile").rglob("*.min.js")}
    assert vendored == set(re.findall(r"[\w.]+\.min\.js", notices))


@pytest.mark.slow
def test_the_string_converts_in_a_fresh_environment(environment, tmp_path):
    run([environment / "bin" / "python", "-c", CONVERTS], tmp_path)
    assert "dagre" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["slcompile"], ["python", "-m", "slcompile"]], ids=" ".join)
def test_the_command_runs_in_a_fresh_environment(environment, tmp_path, command):
    program, *arguments = command
    printed = run([environment / "bin" / program, *arguments, "--help"], tmp_path)
    assert all(name in printed for name in ("diff", "export", "memory", "rates"))
    assert printed.startswith("usage: slcompile ")
