"""What to run before a change is handed in: ``nox -s quick``, ``tests``, ``long``, ``torch-2.11``, ``codegen-2.11``,
``docs``.

``versions`` is the matrix of docs/trust.md, each cell in an environment of its own: ``nox -s versions``, or one cell,
``nox -s "versions-3.12(torch='2.13.0')"``. ``transformers-4`` trains with a wheel beside the last major version.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
# One core a worker: tests compile, and threads that wait for one another are slower than none.
PYTEST = ("pytest", "-n", "auto", "--dist", "loadfile")
QUICK = "not slow and not long and not browser and not gpu"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
FEW = ("onnx", "onnxruntime", "onnxscript", "safetensors", "transformers>=5", "hypothesis", "pytest", "numpy")
"""What the tests of a cell import beside torch."""
CELL = (
    "tests/torch_private",
    "tests/test_factorize.py",
    "tests/passes",
    "tests/behaviour/test_backend_lowerings.py",
    "tests/export/test_checkpoint.py",
    "tests/export/test_onnx.py",
)
"""The tests of a cell: what is private in torch, conversion, every pass, generated code, files. A few CPU minutes."""

nox.options.sessions = ["quick"]
nox.options.error_on_external_run = False


def check(session: nox.Session) -> None:
    """The linter, the formatter and the type checker."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(venv_backend="none")
def quick(session: nox.Session) -> None:
    """Checks, spelling and the quick tests, in the environment that is active. Arguments go to pytest."""
    check(session)
    session.run("codespell")
    session.run(*PYTEST, "-m", QUICK, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """README's test command, in an environment of its own. Arguments go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    check(session)
    session.run(*PYTEST, *session.posargs)


@nox.session(venv_backend="none")
def long(session: nox.Session) -> None:
    """The tests that README's command leaves out, in the environment that is active."""
    session.run(*PYTEST, "-m", "long", *session.posargs)


def install_with_torch_2_11(session: nox.Session, *packages: str) -> None:
    """The pins, except that of torch."""
    # torch decides which triton and setuptools it takes; the pins are those of the newest one.
    free = re.compile(r"^(torch|triton|setuptools)==.*\n", flags=re.MULTILINE)
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(free.sub("", (ROOT / "constraints.txt").read_text()) + "torch==2.11.0\n")
    session.install("-c", str(constraints), *packages)


@nox.session(name="torch-2.11")
def torch_2_11(session: nox.Session) -> None:
    """The same tests with the oldest torch that is supported. Arguments go to pytest."""
    install_with_torch_2_11(session, "-e", ".[test]")
    session.run(*PYTEST, *session.posargs)


@nox.session(name="codegen-2.11")
def codegen_2_11(session: nox.Session) -> None:
    """What torch 2.11 and Triton 3.6 generate for a GPU, the slow tests too; no GPU is needed."""
    install_with_torch_2_11(session, "triton==3.6.0", "numpy", "pytest", "-e", ".")
    session.run("pytest", "-m", "slow or not slow", *(session.posargs or ("tests/codegen",)))


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def versions(session: nox.Session, torch: str) -> None:
    """One Python and one torch: the quick tests of ``CELL``. Arguments go to pytest."""
    session.install(f"torch=={torch}", *FEW, "-e", ".")
    session.run("pytest", "-q", "-m", QUICK, *CELL, *session.posargs)


@nox.session(name="transformers-4")
def transformers_4(session: nox.Session) -> None:
    """The wheel, as a user installs it, beside transformers 4: tests/trains.py trains with it."""
    session.install("build")
    wheels = session.create_tmp()
    session.run("python", "-m", "build", "--wheel", "--outdir", wheels)
    session.install(*map(str, Path(wheels).glob("*.whl")), "transformers>=4.57,<5", "safetensors", "numpy")
    session.run("python", str(ROOT / "tests" / "trains.py"), env={"PYTHONPATH": ""})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into site/; with ``serve`` as the argument, on a local port. Needs no torch."""
    session.install("-c", "constraints.txt", *PYPROJECT["project"]["optional-dependencies"]["docs"])
    session.run("mkdocs", *(session.posargs or ("build", "--strict")), env={"NO_MKDOCS_2_WARNING": "1"})
