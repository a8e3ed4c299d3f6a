"""The kernels that read or add to a matrix at the support: for every device class what they take, and what they write.

Their numbers are those of compose and weight_grads, whose tests run them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slcompile.ops.support import groups_per_row
from tests.kernels.harness import (
    PAPER,
    SUPPORTS,
    TARGETS,
    VECTOR,
    empty,
    empty_sparse,
    require_compiler,
    usages,
    written_to,
)

pytest.importorskip("triton", reason="the kernels need triton")


def launched(target: str, support: str, dtype: torch.dtype, shapes: Any) -> list[Any]:
    """The launches of compose and weight_grads at these shapes."""
    from slcompile.kernels.compose import compose
    from slcompile.kernels.offline import recorded
    from slcompile.kernels.weight_grads import weight_grads

    with recorded(target) as launches:
        for rows, columns, rank, density in shapes:
            B, A = empty(rows, rank, dtype=dtype), empty(rank, columns, dtype=dtype)
            values, where = empty_sparse(support, rows, groups_per_row(columns, density), dtype)
            compose(B, A, values, where, 0.5, vector=VECTOR[support])
            left, right = empty(64, rows, dtype=dtype), empty(64, columns, dtype=dtype)
            weight_grads(left, right, B, A, values, where, 0.5, VECTOR[support])
    return launches


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_at_the_papers_shapes_without_spills(target: str, support: str) -> None:
    require_compiler()
    found = list(usages(launched(target, support, torch.bfloat16, PAPER.values()), target))
    assert {launch.kernel.__name__ for launch, _ in found} == {"add_kernel", "read_kernel"}
    for _, usage in found:
        # 64 registers a thread keep 32 warps on a multiprocessor, half of what it holds.
        assert 0 < usage.registers <= 64
        assert not usage.has_mma


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.usefixtures("target")
def test_only_results_are_written_to(support: str) -> None:
    """Of what it thinks is written to, torch.compile makes copies; a result that it overlooks is lost."""
    found = launched("sm_90", support, torch.bfloat16, [(33, 65, 17, 0.1)])
    assert [(each.kernel.__name__, written_to(each)) for each in found] == [
        ("add_kernel", ["p_matrix"]),
        ("read_kernel", ["p_values"]),
    ]
