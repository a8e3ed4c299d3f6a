"""Mutated files are refused with one clear error, or loaded; nothing crashes, hangs, or is left half changed."""

from __future__ import annotations

import pytest

from tests.fuzz import files

pytestmark = pytest.mark.slow


def test_mutated_files_are_refused_or_loaded():
    counts = {"examples": 0, "wrong": []}
    files.batch(0, counts, size=40)
    assert counts["wrong"] == []
    assert {target.__name__ for target, _ in files.TARGETS} <= counts.keys()


@pytest.mark.parametrize("defect", ["a crash", "a book", "memory", "half a model"])
def test_what_is_no_clear_error_is_seen(defect, monkeypatch):
    """Each kind of defect is counted as one: the harness can fail."""
    import os
    import signal

    import torch

    def target(corpus, random):
        if defect == "a crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        with files.clear_error(ValueError, limit=100):
            if defect == "memory":
                torch.ones(2 * files.SLACK // 4)
            if defect == "a book":
                raise ValueError("x" * 10_000)
        if defect == "half a model":
            raise AssertionError("a refused state dict changed ['0.bias']")

    target.__name__ = files.TARGETS[0][0].__name__
    monkeypatch.setattr(files, "TARGETS", ((target, 1),))
    counts = {"examples": 0, "wrong": []}
    files.batch(0, counts, size=1)
    assert len(counts["wrong"]) == 1, counts
