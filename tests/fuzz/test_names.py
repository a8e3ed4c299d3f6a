"""Modules of odd names: through conversion, report, JSON, page, ONNX and safetensors, and back."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

import slcompile
from slcompile.inspect.onnx_graph import onnx_diff
from tests.fuzz.mutate import NAMES

CONFIG = slcompile.SLConfig(rank=4, density=0.05, exclude=(), seed=0)
ODD = [name for name in NAMES if name]
"""Whatever torch takes for a name; dots, which it refuses, are put where its check does not see them."""
UNWRITABLE = [name for name in ODD if set('"\\\n') & set(name)]
"""Names that torch's own exporter cannot write."""


class Named(nn.Module):
    """A chain of layers of these names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self._modules[name] = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return slcompile.factorize_(Named(ODD), CONFIG)


X = torch.linspace(-1, 1, 3 * 32).reshape(3, 32)
WEIGHTS = [f"{name}.weight" for name in ODD]


@pytest.mark.slow
def test_conversion_and_report(aten_kernels):
    model = Named(ODD)
    torch.compile(model, backend="sltrain", options={"rank": 4, "exclude": ()})(X).sum().backward()
    assert set(slcompile.factors(model)) == set(WEIGHTS)
    report = slcompile.last_report()
    assert {each.name for each in report.replaced} == set(WEIGHTS)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    # A name with a line break or an escape does not write lines of its own.
    assert len(str(report).splitlines()) == 1 + len(ODD)
    assert "\u202e" not in str(report)


@pytest.mark.slow
def test_explanation_json_and_page(tmp_path):
    found = slcompile.explain(Named(ODD), (X,), config=CONFIG)
    assert {each.name for each in found.matmuls} == set(WEIGHTS)
    path = found.to_json(tmp_path / "found.json")
    again = slcompile.Explanation.from_json(path)
    assert {each.name for each in again.matmuls} == set(WEIGHTS)
    page = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "alert(1)" in page


@pytest.mark.slow
def test_onnx(tmp_path):
    torch.manual_seed(0)
    model = slcompile.factorize_(Named([name for name in ODD if name not in UNWRITABLE]), CONFIG)
    path = slcompile.export_onnx(model, (X,), tmp_path / "model.onnx").path
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    assert set(stored) == {f"{name}.weight" for name in ODD if name not in UNWRITABLE}
    for name, merged in slcompile.merged_state_dict(model).items():
        assert torch.equal(torch.from_numpy(stored[name].copy()), merged)
    diff = onnx_diff(path, path)
    assert json.loads(diff.to_json(tmp_path / "diff.json").read_text(encoding="utf-8"))
    assert "<script>alert" not in diff.to_html(tmp_path / "diff.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_name_that_torch_cannot_export_is_said(name, tmp_path):
    with pytest.raises(ValueError, match=r"torch\.onnx\.export cannot write the name of module "):
        slcompile.export_onnx(Named([name]), (X,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_safetensors_and_state_dicts(model, tmp_path):
    slcompile.save_merged(model, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    dense = slcompile.merged_state_dict(model)
    assert set(stored) == set(WEIGHTS)
    assert all(torch.equal(stored[name], dense[name]) for name in WEIGHTS)
    plain = Named(ODD)
    plain.load_state_dict(stored, strict=False)  # torch takes what has a dot for a module in a module
    torch.testing.assert_close(plain(X), model(X))
    twin = slcompile.factorize_(Named(ODD), CONFIG)
    twin.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(twin(X), model(X))
