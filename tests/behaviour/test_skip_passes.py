"""A pass that is left out by name, to find the one that is to blame for a wrong number."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.config import SKIPPABLE
from slcompile.passes import joint_passes, post_passes
from slcompile.passes.graph import pass_name
from tests.testing import LITE, some_of

ALL_OF_THEM = " ".join(SKIPPABLE)
# A graph that Inductor finds in its cache meets no pass after partitioning.
INDUCTOR = {**LITE["inductor"], "fx_graph_cache": False}
OPTIONS = {"rank": 8, "density": 0.05, "lowering": "factored", "inductor": INDUCTOR}
ALL = ["parameterize_weights", *SKIPPABLE[:-2], *SKIPPABLE[-2:] * 2]  # the last two on forward and backward


class Projections(nn.Module):
    """Something for every pass: a convolution, two products with one input, and a third with parts of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Conv1d(64, 64, 1)
        self.up, self.gate = nn.Linear(64, 96), nn.Linear(64, 96)
        self.packed = nn.Parameter(torch.randn(128, 96) / 8)

    def forward(self, x: Tensor) -> Tensor:
        points = self.points(x.t().unsqueeze(0)).squeeze(0).t()
        x = torch.sin(x)
        hidden = self.up(x) * torch.sigmoid(self.gate(x))
        first, second = self.packed.chunk(2)
        return points + hidden @ first.t() + torch.tanh(hidden @ second.t())


def ran(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """Name of each pass that ran -> how many it replaced, in all graphs."""
    found: dict[str, int] = {}
    for record in caplog.records:
        if record.name == "slcompile.passes":
            report = record.args[0]
            found[report.pass_name] = found.get(report.pass_name, 0) + len(report.replaced)
    return found


def test_every_pass_of_the_two_tuples_can_be_skipped():
    config = slcompile.SLConfig()
    assert [pass_name(each) for each in (*joint_passes(config), *post_passes(config))] == list(SKIPPABLE)
    config = slcompile.SLConfig(skip_passes=SKIPPABLE)
    assert (*joint_passes(config), *post_passes(config)) == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "skipped", some_of(("", *SKIPPABLE, ALL_OF_THEM), ("", "choose_lowering", "lower_ops", ALL_OF_THEM))
)
def test_a_pass_that_is_skipped_does_not_run_and_the_numbers_stay(skipped, caplog, assert_eager):
    skipped = tuple(skipped.split())
    model, x = Projections(), torch.randn(16, 64)
    slcompile.factorize_(model, slcompile.SLConfig(rank=8, density=0.05, init="spectral"), example_args=(x,))
    assert len(slcompile.factors(model)) == 4
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "save": "low_rank", "skip_passes": skipped})
    with caplog.at_level(logging.DEBUG, "slcompile.passes"):
        assert_eager(compiled, model, [x])
    found = ran(caplog)
    assert found.keys() == set(SKIPPABLE) - set(skipped)
    if not skipped:
        del found["read_transposed"]  # which is for GPUs
        assert all(found.values()), found  # each has something to do here, so leaving it out is to leave something out


def test_explain_shows_the_passes_that_will_run():
    found = slcompile.explain(
        Projections(), (torch.randn(16, 64),), config=slcompile.SLConfig(rank=8, skip_passes="fuse_weight_grads")
    )
    names = [row.name for row in found.passes]
    assert names == [each for each in ALL if each != "fuse_weight_grads"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "fuse_weight_grad",
            r"^skip_passes got 'fuse_weight_grad', did you mean 'fuse_weight_grads'\?; allowed: flatten_",
        ),
        (["lower_ops", "find_matmuls"], r"^skip_passes got 'find_matmuls'.*; allowed: "),  # nothing goes without it
        ([1], "^skip_passes got 1; allowed: "),
        (None, "^skip_passes must be a sequence of names of passes, got None"),
    ],
)
def test_an_unknown_name_is_refused(given, message, block, batch):
    with pytest.raises(ValueError, match=message):
        slcompile.SLConfig(skip_passes=given)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message.removeprefix("^")):
        torch.compile(block, backend="sltrain", options={"skip_passes": given})(batch[0])
    assert type(block.up) is nn.Linear
