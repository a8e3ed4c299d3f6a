"""A checkpoint that some processes wrote, in any layout of FSDP2 and tensor parallelism, is read in any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import reshaped

from tests.testing import on_processes

pytestmark = pytest.mark.slow

SCRIPT = Path(reshaped.__file__)


def read_by(processes: int, folder: Path, function: str = "read") -> dict[str, list[str]]:
    """What each layout of so many processes reads that is not what was written."""
    results = on_processes(SCRIPT, folder, function, processes=processes)[function]
    for result in results:  # whole tensors are the same on all of them
        assert result == results[0]
    return results[0]


def test_one_process_and_two_read_what_two_wrote(tmp_path):
    found = read_by(2, tmp_path, "read_and_write") | reshaped.read(tmp_path)
    assert len(found) == 2 * (2 + 1)
    assert not any(found.values()), found


@pytest.mark.long
def test_every_layout_reads_what_every_layout_wrote(tmp_path):
    on_processes(SCRIPT, tmp_path, "write")
    found = read_by(4, tmp_path, "read_and_write") | read_by(2, tmp_path) | reshaped.read(tmp_path)
    assert len(found) == (2 + 3) * (3 + 2 + 1)
    assert not any(found.values()), found
