"""PyTorch's own exporters, called directly on a factorized model: what they write needs no slcompile to run."""

from __future__ import annotations

import subprocess
import sys

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import slcompile
from tests.testing import Plain, some_of

TRAINED = ["stratified", "uniform"]


@pytest.fixture(params=TRAINED)
def trained(request: pytest.FixtureRequest) -> nn.Module:
    """A model in eval mode after a training step, factorized with the support of the parameter."""
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(rank=8, density=0.05, support=request.param))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    return model.eval()


def ops_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


def assert_same(found: Tensor, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_holds_the_factors_and_aten_alone(trained, strict):
    x, tokens = torch.randn(8, 64), torch.export.Dim("tokens", min=2)
    program = torch.export.export(trained, (x,), dynamic_shapes=({0: tokens},), strict=strict)
    assert "up.weight_sl.B" in program.state_dict
    for exported in (program, program.run_decompositions()):
        assert ops_of(exported) == {"aten"}
        for rows in (x, torch.randn(5, 64)):
            assert_same(exported.module()(rows), trained, rows)


@pytest.mark.slow
@pytest.mark.parametrize("trained", some_of(TRAINED, ["uniform"]), indirect=True)
def test_a_saved_program_runs_where_slcompile_is_not_installed(trained, tmp_path):
    x = torch.randn(8, 64)
    torch.export.save(torch.export.export(trained, (x,)), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys

sys.modules["slcompile"] = None
import torch

program = torch.export.load("model.pt2")
torch.save(program.module()(torch.load("x.pt")).detach(), "y.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert_same(torch.load(tmp_path / "y.pt"), trained, x)


@pytest.mark.slow
def test_torch_onnx_export(trained, tmp_path):
    x = torch.randn(8, 64)
    torch.onnx.export(trained, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(found), trained, x)


@pytest.mark.slow
@pytest.mark.parametrize("trained", some_of(TRAINED, ["stratified"]), indirect=True)
def test_aot_inductor(trained, tmp_path):
    x = torch.randn(8, 64)
    program = torch.export.export(trained, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(path)(x), trained, x)


def test_a_weight_of_bfloat16_is_as_exact_as_the_model(tmp_path):
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(rank=8, density=0.05)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_sl.B"):
                parameter.normal_(std=0.1)
        x = torch.randn(8, 64, dtype=torch.bfloat16)
        found = torch.export.export(model, (x,)).module()(x)
        eager, exact = model(x), model.double()(x.double())
    assert (found - exact).norm() <= 2 * (eager - exact).norm()
