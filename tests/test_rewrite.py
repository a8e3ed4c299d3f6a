"""rewrite on the graphs of symbolic_trace and torch.export."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import fx, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.fx.experimental.proxy_tensor import make_fx

import slcompile
from tests.testing import CONFIG, randomize


def test_rewrite_of_a_symbolic_trace(block, batch):
    gm = fx.symbolic_trace(block)
    report = slcompile.rewrite(gm, CONFIG)
    assert {each.name for each in report.replaced} == {"up.weight", "down.weight", "mix"}
    assert [(each.name, each.reason) for each in report.left] == [("head.weight", "too_small")]
    code = gm.code
    assert code.count("torch.ops.slcompile.compose.default") == 3
    assert re.search(r"linear\(x, \w+, up_bias\)", code)
    randomize(gm)
    dense = type(block)()
    dense.load_state_dict(slcompile.merged_state_dict(gm))
    torch.testing.assert_close(gm(batch[0]), dense(batch[0]))
    gm(batch[0]).sum().backward()
    assert block.up.weight_sl.values.grad is not None
    assert slcompile.rewrite(gm, CONFIG).replaced == []  # twice changes nothing
    assert gm.code == code
    want = gm(batch[0])
    slcompile.merge_(gm)
    assert "compose" not in gm.code
    torch.testing.assert_close(gm(batch[0]), want, rtol=1e-5, atol=1e-6)


def test_rewrite_of_an_exported_program_leaves_the_exported_model_alone(block, batch):
    gm = torch.export.export(block, (batch[0],)).module()
    report = slcompile.rewrite(gm, CONFIG)
    assert {each.name for each in report.replaced} == {"up.weight", "down.weight", "mix"}
    assert type(block.up) is nn.Linear
    output = randomize(gm)(batch[0])
    output.sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(batch[0]), output)
    slcompile.merge_(gm)
    torch.testing.assert_close(gm(batch[0]), output, rtol=1e-5, atol=1e-6)


def test_rewrite_needs_weights_that_are_attributes():
    gm = make_fx(lambda x, w: x @ w)(torch.randn(2, 64), torch.randn(64, 64))
    with pytest.raises(ValueError, match="gm reads no weight as an attribute"):
        slcompile.rewrite(gm, CONFIG)


def test_leaf_modules_with_a_forward_pass_of_their_own_stay_dense():
    """What they do to the weight before they multiply with it is theirs: it is not inlined."""
    rounding = get_default_qat_qconfig("x86")
    model = nn.Sequential(qat.Conv2d(32, 64, 1, qconfig=rounding), nn.Flatten(), qat.Linear(64, 64, qconfig=rounding))
    gm = fx.symbolic_trace(nn.Sequential(*model, nn.Linear(64, 64)))
    report = slcompile.rewrite(gm, CONFIG)
    assert [each.name for each in report.replaced] == ["3.weight"]
    assert [(each.name, each.detail) for each in report.left] == [
        ("0.weight", "read by the forward pass of Conv2d, not by a matmul"),
        ("2.weight", "read by the forward pass of Linear, not by a matmul"),
    ]
    assert type(gm.get_submodule("0")) is qat.Conv2d
    assert gm(torch.randn(2, 32, 1, 1)).shape == (2, 64)
