"""What an import costs and where imports go, each seen in a fresh process or in the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import slcompile

ROOT = Path(slcompile.__file__).parent


def test_public_names():
    assert set(slcompile.__all__) == {
        "Decision", "Explanation", "ExportReport", "Factors", "GraphDiff", "MemoryReport", "PassReport", "SLConfig",
        "SLWeight", "estimate_memory", "explain", "export_onnx", "factorize_", "factors", "graph_diff", "last_report",
        "load_factorized",
        "merge_", "merged_state_dict", "rewrite", "save_factorized", "save_merged", "Spectra",
        "StepLimit", "limit_steps", "spectra",
    }  # fmt: skip
    assert all(hasattr(slcompile, name) for name in slcompile.__all__)


def test_importing_needs_neither_triton_nor_the_extras():
    script = """
import sys
for name in ("triton", "onnx", "onnxruntime", "onnxscript", "transformers", "rich", "jinja2", "matplotlib"):
    sys.modules[name] = None  # an import of it raises
import slcompile, slcompile.backend
layer = slcompile.factorize_(__import__("torch").nn.Sequential(__import__("torch").nn.Linear(64, 64)))
print(sorted(slcompile.factors(layer)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "['0.weight']\n", done.stderr


@pytest.mark.parametrize(
    ("part", "must_not_import"),
    [
        ("ops", ("passes", "backend", "factorize", "weight", "kernels", "export")),
        ("passes", ("backend", "factorize", "weight", "capture", "export")),
        ("kernels", ("ops", "passes", "backend", "factorize", "weight", "export")),
        ("export", ("backend",)),
    ],
)
def test_imports_run_one_way(part, must_not_import):
    for file in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("slcompile"):
                assert node.module.split(".")[1:2] not in [[name] for name in must_not_import], (file.name, node.module)
                # Only the package's own name: an installed top-level "passes" would be somebody else's.
            assert not (isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "passes")
