"""The weights of convolutions in reports, estimates, ONNX files and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slcompile
from tests.convolutions.models import CONFIG, IMAGES, OPTIONS, PIXELS, SHAPES, STRUCTURES, Small, resnet
from tests.testing import randomize


@pytest.mark.slow
def test_explain_counts_patches_and_says_what_becomes_of_them() -> None:
    found = slcompile.explain(Small(), (IMAGES,), config=CONFIG)
    rows = {row.name: row for row in found.matmuls}
    assert {name: row.shape for name, row in rows.items()} == SHAPES
    assert {row.decision for row in rows.values()} == {"replaced"}
    assert (rows["wide.weight"].tokens, rows["point.weight"].tokens) == (3 * 4 * 5, 3 * 4 * 5)
    # The first one's input needs no gradient: 2 products of 3.
    dense = 2 * 3 * 4 * 5 * 32 * 72
    assert rows["wide.weight"].flops.before == 2 * dense
    assert rows["wide.weight"].flops.after == 2 * dense + (2 + 4) * 32 * 72 * 6
    assert rows["point.weight"].flops.before == 3 * 2 * 3 * 4 * 5 * 24 * 32
    factored = slcompile.explain(Small(), (IMAGES,), config=slcompile.SLConfig(**OPTIONS, lowering="factored"))
    lowerings = {row.name: row.lowering for row in factored.matmuls}
    assert lowerings == {"wide.weight": "", "point.weight": "factored", "head.weight": "factored"}
    assert "32x8x3x3" in str(found)


@pytest.mark.slow
def test_onnx_files_hold_the_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    randomize(model, 0.2)
    for compact in (False, True):
        report = slcompile.export_onnx(model, (IMAGES,), tmp_path / "model.onnx", compact=compact)
        assert set(report.merged if not compact else SHAPES) == set(SHAPES)
        assert report.max_abs < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["vector", "cp"])
def test_a_checkpoint_says_that_it_is_a_kernel(structure: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = resnet()
    options = {"rank": 6, "seed": 1, **STRUCTURES[structure]}
    slcompile.factorize_(model, slcompile.SLConfig(**options))
    randomize(model, 0.1).eval()
    slcompile.save_factorized(model, tmp_path / "factors")
    loaded = slcompile.load_factorized(tmp_path / "factors").eval()
    name = "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight_sl"
    assert loaded.get_submodule(name).stored_shape == model.get_submodule(name).stored_shape == (32, 32, 3, 3)
    torch.testing.assert_close(loaded(**PIXELS).logits, model(**PIXELS).logits)


@pytest.mark.slow
def test_memory_is_estimated() -> None:
    report = slcompile.estimate_memory(Small(), (IMAGES,), config=CONFIG)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    assert report.sltrain.parameter_count == sum(each.numel() for each in model.parameters())
    assert report.sltrain.largest["parameters"] == sum(each.nbytes for each in model.parameters())
