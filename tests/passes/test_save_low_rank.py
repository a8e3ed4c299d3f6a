from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slcompile
from slcompile.passes import save_low_rank
from tests.passes.saved import OPTIONS, Net, compiled_reports
from tests.testing import some_of


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 48) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradients(model: nn.Module, x: Tensor, **options: object) -> list[Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, **options})
    x = x.clone().requires_grad_()
    y = compiled(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "support"),
    some_of(
        [(Net, "stratified"), (Net, "vector"), (Net, "uniform"), (Chain, "stratified")],
        [(Net, "vector"), (Chain, "stratified")],
    ),
)
def test_the_same_numbers(make, support):
    model = make()
    slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS, support=support))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(37, 48)
    found, expected = (gradients(model, x, support=support, save=save) for save in ("low_rank", "all"))
    for ours, theirs in zip(found, expected, strict=True):
        # The same operations; generated code may fuse, and so round, them elsewhere.
        assert float((ours - theirs).norm()) <= 2**-21 * float(theirs.norm())


@pytest.mark.slow
def test_of_a_gated_mlp_the_hidden_matrices_and_nothing_wide_are_saved(monkeypatch):
    x = torch.randn(37, 48)
    everything, _ = compiled_reports(Net(), x, "all", monkeypatch)
    assert (37, 96) in everything
    shapes, (report,) = compiled_reports(Net(), x, "low_rank", monkeypatch)
    assert shapes.count((37, 4)) == 3
    assert (37, 96) not in shapes
    # Gate and up in one op; what down multiplies follows from them.
    assert [each.matmuls for each in report.replaced] == [2]
    assert [each.reason for each in report.left] == ["follows"]


def test_of_a_chain_every_second_result_is_computed_again(monkeypatch):
    _, (report,) = compiled_reports(Chain(), torch.randn(37, 48), "low_rank", monkeypatch)
    assert len(report.replaced) == 2
    assert [each.reason for each in report.left] == ["follows", "follows"]


@pytest.mark.parametrize("save", ["all", "auto", "low_rank"])
@pytest.mark.parametrize("support", ["stratified", "vector"])
def test_no_transposed_copy_is_saved(support, save, monkeypatch):
    """The stratified support's products read copies with the tokens in the columns, which lowering makes."""
    monkeypatch.setitem(OPTIONS, "support", support)
    shapes, _ = compiled_reports(Net(), torch.randn(37, 48), save, monkeypatch)
    assert shapes
    assert all(shape[0] == 37 for shape in shapes)
    assert ((37, 96) in shapes) == (save != "low_rank")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin() + self.first(x.sin())
        return (x + torch.relu(self.second(x))).cos()


def test_what_is_only_added_to_a_stream_is_left_and_the_stream_is_saved(monkeypatch):
    shapes, (report,) = compiled_reports(Residual(), torch.randn(37, 48), "low_rank", monkeypatch)
    assert [each.reason for each in report.left] == ["added"]
    assert len(report.replaced) == 1
    assert shapes.count((37, 48)) >= 1


def test_a_checkpointed_region_is_left_to_its_user(monkeypatch):
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    _, (report,) = compiled_reports(Checkpointed(), torch.randn(37, 48), "low_rank", monkeypatch)
    assert report.replaced == []
    assert {each.reason for each in report.left} == {"checkpointed"}


def test_a_forward_graph_alone_and_all_are_left_as_they_are(monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x: x.sin())(torch.ones(3))
    for save in ("low_rank", "all"):
        report = save_low_rank(gm, save)
        assert report.replaced == report.left == []
    _, (report,) = compiled_reports(Net(), torch.randn(37, 48), "all", monkeypatch)
    assert report.replaced == report.left == []
