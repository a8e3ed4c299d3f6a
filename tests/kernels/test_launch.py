"""How kernels are launched: their precision follows torch's setting, old or new, and so do their tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slcompile.cost.devices import GPU_CLASSES
from tests.kernels.harness import PAPER, empty, require_compiler, usages

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("api", ["old", "new"])
@pytest.mark.parametrize("allowed", [False, True])
def test_dots_of_float32_are_as_precise_as_torchs(api: str, allowed: bool) -> None:
    """Where the new setting was used, reading the old one raises."""
    from slcompile.kernels.launch import dot_precision

    if api == "old":
        torch.backends.cuda.matmul.allow_tf32 = allowed
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    assert dot_precision() == ("tf32" if allowed else "ieee")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_has_matrix_instructions_where_torch_may_use_tf32(target: str) -> None:
    require_compiler()
    from slcompile.kernels.offline import recorded
    from slcompile.kernels.project import project

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    _, columns, rank, _ = PAPER["1B_qkv"]
    with recorded(target) as launches:
        project(empty(64, columns, dtype=torch.float32), [empty(rank, columns, dtype=torch.float32)], [1.0])
    (first, usage), (second, _) = usages(launches, target)
    assert [each.kernel.__name__ for each in (first, second)] == ["project_kernel", "sum_splits_kernel"]
    assert usage.has_mma


@pytest.mark.parametrize("row", GPU_CLASSES, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_those_of_the_device(row, dtype: torch.dtype) -> None:
    from slcompile.kernels.offline import recorded
    from slcompile.kernels.project import PROJECT, project

    with recorded(row.name) as (launches):
        project(empty(4, 64, dtype=dtype), [empty(8, 64, dtype=dtype)], [1.0])
    tile = (row.tiles_32 if dtype == torch.float32 else row.tiles)[PROJECT.name]
    given = {**launches[0].arguments, **launches[0].options}
    assert {name: given[name] for name in tile} == tile
