"""What an import costs and where imports go, each seen in a fresh process or in the sources."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slcompile

ROOT = Path(slcompile.__file__).parent


def test_public_names():
    assert set(slcompile.__all__) == set(
        """BenchReport CheckReport Compression Decision Explanation ExportReport Factors GraphDiff MemoryReport
        PassReport SLConfig SLWeight Spectra StepLimit SuggestedRank Suggestion bench check compress estimate_memory
        explain export_onnx factorize_ factors graph_diff last_report limit_steps load_factorized load_peft merge_
        merged_state_dict optim parallelize rewrite save_factorized save_merged save_peft share_factors spectra
        suggest""".split()
    )
    assert all(hasattr(slcompile, name) for name in slcompile.__all__)


@pytest.mark.slow
def test_importing_needs_neither_triton_nor_the_extras():
    script = """
import sys
for name in ("triton", "onnx", "onnxruntime", "onnxscript", "transformers", "rich", "jinja2", "matplotlib"):
    sys.modules[name] = None  # an import of it raises
import slcompile, slcompile.backend, slcompile.kernels, slcompile.ops.support
layer = slcompile.factorize_(__import__("torch").nn.Sequential(__import__("torch").nn.Linear(64, 64)))
print(sorted(slcompile.factors(layer)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "['0.weight']\n", done.stderr


FLOORS = (
    ("config", "files", "torch_private"),
    ("ops",),
    ("cost", "models", "names"),
    ("kernels", "weight"),
    ("measure", "optim", "passes"),
    ("convert",),
    ("captured", "factorize", "rewrite"),
    ("backend", "benchmark", "export", "health", "inspect", "memory"),
    ("__init__", "cli", "integrations"),
    ("__main__",),
)
"""The rooms, which are the modules and folders directly under slcompile/, from the ground up: imports go down."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Name of every module -> its file. Passes are read through the link by which they are part of the package."""
    found = {}
    for folder in (ROOT, ROOT / "passes"):  # rglob does not follow links
        for file in folder.rglob("*.py"):
            parts = ["slcompile", *file.relative_to(ROOT).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports() -> dict[str, set[str]]:
    """Name of every module -> the modules of the package that it imports, at its top or in a function."""
    files = sources()
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: a relative import"
            # What is imported for types only is an arrow, too.
            assert not (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING"), module
            names = []
            if isinstance(node, ast.ImportFrom):
                submodules = [f"{node.module}.{each.name}" for each in node.names]
                names = [each if each in files else str(node.module) for each in submodules]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            # An installed top-level "passes" would be somebody else's.
            assert not [name for name in names if name.split(".")[0] == "passes"], module
            found[module].update(name for name in names if name.split(".")[0] == "slcompile")
    return found


def room(module: str) -> str:
    """The room of a module; of the package itself, ``__init__``."""
    return [*module.split("."), "__init__"][1]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The shortest circle through each module or room that is on one."""
    found: dict[frozenset[str], list[str]] = {}
    for start in arrows:
        paths = [[start]]
        seen = {start}
        while paths:
            path = paths.pop(0)
            for target in arrows.get(path[-1], ()):
                if target == start:
                    found.setdefault(frozenset(path), [*path, start])
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return list(found.values())


def test_every_module_is_read():
    found = sources()
    assert {"slcompile", "slcompile.backend", "slcompile.inspect.page", "slcompile.passes.lower_ops"} <= found.keys()
    importable = {each.name for each in pkgutil.walk_packages(slcompile.__path__, "slcompile.")}
    assert importable == found.keys() - {"slcompile"}


def test_every_room_has_a_floor():
    assert {room(module) for module in sources()} == FLOOR.keys()


def test_readme_prints_the_same_floors():
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    printed = readme.partition("Imports go down: ")[2].partition(". [")[0]
    floors = [tuple(re.findall(r"`(\w+)`", floor)) for floor in printed.split("→")]
    entry_points = {"__init__", "__main__"}
    assert floors[::-1] == [
        rooms for floor in FLOORS if (rooms := tuple(each for each in floor if each not in entry_points))
    ]


def test_every_import_goes_down():
    up = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in sorted(targets)
        if room(module) != room(target) and FLOOR[room(module)] <= FLOOR[room(target)]
    ]
    assert up == []


def test_nothing_goes_in_a_circle():
    arrows = imports()
    assert circles({module: targets - {module} for module, targets in arrows.items()}) == []
    rooms: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        rooms.setdefault(room(module), set()).update({room(target) for target in targets} - {room(module)})
    assert circles(rooms) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c", "b"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]


def test_the_root_stays_small():
    names = [each for each in ROOT.iterdir() if not each.name.startswith((".", "__pycache__"))]
    modules, folders = [each.name for each in names if each.suffix == ".py"], [each for each in names if each.is_dir()]
    assert len(modules) <= 13, sorted(modules)
    assert len(folders) <= 13, sorted(folders)
