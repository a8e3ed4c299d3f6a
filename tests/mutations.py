"""Plants defects, one by one, and runs what should notice: ``python -m tests.mutations [NAME ...]``.

Those of ``PLANTED`` replace a function of a pass, an op or a weight; ``slcompile.check`` has to find each, and so has a
test of the suite. Those of ``EDITED`` change a line of a kernel in a copy of the sources; Triton's run in its
interpreter, where only the suite can find them. Prints a table for docs/trust.md.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ("-m", "long or not long")  # of planted defects only some are run without
CHECK = "tests/behaviour/test_check.py"
LOWERED = "tests/behaviour/test_backend_lowerings.py::test_every_lowering_trains_as_eager_does[composed-stratified]"
FACTORED = "tests/ops/test_linear_factored.py::test_error_is_within_the_references"
CHOSEN = "tests/passes/test_choose_lowering.py::test_same_numbers_and_twice_changes_nothing"
GROUPED = "tests/passes/test_group_projections.py::test_siblings_become_one_with_the_same_numbers"
SPARSE = "tests/ops/test_sparse_cpu.py::TestOps::test_addmm_is_its_formula"
SUITE = {
    "compose: product": "tests/ops/test_compose.py::TestForward::test_equals_the_formula",
    "weight_grads": "tests/ops/test_weight_grads.py::test_error_is_within_the_references",
    "values_grad": "tests/ops/test_values_grad.py::test_error_is_within_the_references",
    "values_grad: rows": "tests/ops/test_values_grad.py::test_error_is_within_the_references",
    "linear_factored: result": FACTORED,
    "linear_factored: bias": FACTORED,
    "sparse: rows": SPARSE,
    "sparse: columns": SPARSE,
    "sparse: support": "tests/ops/test_sparse_cpu.py::TestEntries::test_agree_with_the_flat_positions",
    "parameterize_weights: scale": "tests/test_backend.py::test_the_first_call_already_computes_with_the_factors",
    "parameterize_weights: operands": "tests/test_backend.py::test_the_first_call_already_computes_with_the_factors",
    "fuse_weight_grads": "tests/passes/test_fuse_weight_grads.py",
    "choose_lowering: hidden": CHOSEN,
    "choose_lowering: gradients": CHOSEN,
    "choose_lowering: side": CHOSEN,
    "group_projections: order": GROUPED,
    "merged_wide": "tests/test_factorize.py::test_merge_restores_a_plain_model_with_the_same_outputs",
    "mend: another start": "tests/test_backend.py::test_the_first_call_already_computes_with_the_factors",
    "recompute_weights": LOWERED,
    "save_low_rank": LOWERED,
    "vector: result": "tests/ops/test_linear_factored.py::test_equals_the_product_with_the_composed_weight",
    "vector: gradients": "tests/ops/test_values_grad.py::test_error_is_within_the_references",
    "lower_ops": "tests/passes/test_lower_ops.py::test_same_numbers_and_twice_changes_nothing",
}
"""Name of each planted defect -> the test of the suite that finds it, beside ``check``'s."""

_KERNELS = "slcompile/kernels/"
_COMPOSED = "tests/kernels/test_compose.py::test_interpreted_error_is_within_the_references"
_PRODUCT = "tests/kernels/test_linear_factored.py::test_interpreted_error_is_within_the_references"
_GRADS = "tests/kernels/test_weight_grads.py::test_interpreted_error_is_within_the_references"
EDITED = {
    # name: file, a line's part that is there once, what takes its place, the test that finds it
    "kernel add: sign": (
        _KERNELS + "entries.py",
        "b_sum += tl.load(p_values",
        "b_sum -= tl.load(p_values",
        _COMPOSED,
    ),
    "kernel add: bounds": (
        _KERNELS + "entries.py",
        "b_sum.to(p_matrix.dtype.element_ty), mask=is_there",
        "b_sum.to(p_matrix.dtype.element_ty), mask=is_there & (o_value > 0)",
        _COMPOSED,
    ),
    "kernel read: twice": (_KERNELS + "entries.py", "b_entry.to(", "(2 * b_entry).to(", _GRADS),
    "kernel support: hash": (
        _KERNELS + "support.py",
        "+ group.to(tl.uint32)",
        "- group.to(tl.uint32)",
        "tests/kernels/test_support.py::test_interpreted_kernel_equals_torch_bit_for_bit",
    ),
    "kernel factored: low-rank part": (_KERNELS + "linear_factored.py", "b_y += b_dot", "b_y -= b_dot", _PRODUCT),
    "kernel factored: bias": (
        _KERNELS + "linear_factored.py",
        "b_y += tl.load(p_bias",
        "b_y -= tl.load(p_bias",
        _PRODUCT,
    ),
    "kernel factored: sparse part": (
        _KERNELS + "linear_factored.py",
        "b_gather += b_value",
        "b_gather = b_value",
        _PRODUCT,
    ),
    "kernel transposed: sparse part": (_KERNELS + "linear_factored.py", "b_column == tl", "b_column <= tl", _PRODUCT),
    "kernel sum: splits": (_KERNELS + "siblings.py", "p_split += total", "p_split += 0", _PRODUCT),
    "kernel project: scale": (_KERNELS + "project.py", "b_sum * tl.cast(scale, tl.float32)", "b_sum", _PRODUCT),
    "C++ vector: few tokens": (
        _KERNELS + "vector.cpp",
        "sums[token] += part * *(const",
        "sums[token] = part * *(const",
        "tests/ops/test_vector_cpu.py::test_addmm_is_its_formula",
    ),
    "C++ vector: transposed": (
        _KERNELS + "vector.cpp",
        "result[columns[block * groups + first + group]] += sums[group]",
        "result[columns[block * groups + first + group]] = sums[group]",
        "tests/ops/test_vector_cpu.py::test_addmm_is_its_formula",
    ),
}  # fmt: skip


def plant(name: str) -> None:
    """Plants a defect in this process, before any test is imported."""
    from tests.behaviour.test_check import PLANTED, owner_of, scaled

    if name == "lower_ops":
        where, attribute, change = "slcompile.passes.lower_ops", "linear_factored_aten", scaled
    else:
        where, attribute, change, _ = PLANTED[name]
    owner = owner_of(where)
    setattr(owner, attribute, change(getattr(owner, attribute)))


def finds_planted(test: str, name: str) -> bool:
    """Says whether a test fails in a fork of this process in which a defect was planted."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            plant(name)
            code = int(pytest.main(["-q", "-x", *ALL, "-p", "no:cacheprovider", test]))
        finally:
            os._exit(code)
    return failed(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), f"{test} with {name}")


def failed(code: int, what: str) -> bool:
    """Says whether tests failed, by pytest's exit code.

    Raises:
        RuntimeError: They neither failed nor passed: there is no such test, or it cannot be collected.
    """
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}: {what}")
    return code == 1


def run_tests(tests: Iterable[str], root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs tests in a process of their own, of these sources."""
    command = [sys.executable, "-m", "pytest", "-q", *ALL, "-p", "no:cacheprovider", "--tb=line", "-rA", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    failed(done.returncode, done.stdout[-2000:] + done.stderr[-2000:])
    return done


def in_a_copy(file: str, old: str, new: str, test: str) -> bool:
    """Says whether a test finds what one edit does to a copy of the sources.

    Raises:
        RuntimeError: The text is not there once.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for each in ("slcompile", "passes", "tests"):
            shutil.copytree(ROOT / each, root / each, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise RuntimeError(f"{file} holds {text.count(old)} times what is to be replaced: {old}")
        (root / file).write_text(text.replace(old, new))
        return run_tests([test], root).returncode == 1


def main(names: list[str]) -> int:
    os.chdir(ROOT)
    # What a defect is compiled to must not be found in a cache by those who come later.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    wanted = {name: SUITE[name] if name in SUITE else EDITED[name][3] for name in names}
    healthy = run_tests(sorted(set(wanted.values())))
    if healthy.returncode:
        raise RuntimeError(f"tests fail without a defect: {healthy.stdout[-2000:]}")
    cases = {name: f"test_a_planted_defect_is_found[{name}]" for name in names if name in SUITE}
    cases |= {"lower_ops": "test_a_defect_of_lower_ops_is_blamed_on_it"} if "lower_ops" in cases else {}
    checked = run_tests(f"{CHECK}::{case}" for case in cases.values()).stdout if cases else ""
    importlib.import_module("tests.behaviour.test_check")  # with torch and all of slcompile, so that forks need not

    print("| defect | `check` | suite | test |\n|---|---|---|---|", flush=True)
    missed = []
    for name, test in wanted.items():
        by_check = f"PASSED {CHECK}::{cases[name]}\n" in checked if name in cases else None
        by_suite = finds_planted(test, name) if name in SUITE else in_a_copy(*EDITED[name])
        words = ["" if each is None else "found" if each else "**missed**" for each in (by_check, by_suite)]
        missed += [name] if not by_suite or by_check is False else []
        print(f"| {name} | {words[0]} | {words[1]} | `{test.removeprefix('tests/')}` |", flush=True)
    print(f"\n{len(names)} defects, {len(missed)} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [*SUITE, *EDITED]))
