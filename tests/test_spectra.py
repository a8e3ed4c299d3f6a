"""Spectra of the parts against those of dense matrices, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import slcompile
from slcompile.inspect.spectra import effective_rank, plot_spectra


class Experts(nn.Module):
    """A stack of matrices, read by a batched matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 64, 48))

    def forward(self, x):
        return torch.bmm(x, self.w)


def random_factors(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_sl." in name:
                parameter.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_they_are_those_of_the_dense_matrices(support):
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 40))
    slcompile.factorize_(model, slcompile.SLConfig(rank=8, density=0.1, support=support, seed=0))
    random_factors(model)
    found = slcompile.spectra(model)
    assert list(found) == ["0.weight", "1.weight"]
    for name, parts in slcompile.factors(model).items():
        weight = model.get_submodule(name[:1]).weight.detach()
        low_rank = parts.scale * parts.B @ parts.A
        exact = {"low_rank": low_rank, "sparse": weight - low_rank, "weight": weight}
        for part, matrix in exact.items():
            wanted = torch.linalg.svdvals(matrix.double()).float()
            got = getattr(found[name], part)
            assert len(got) == (8 if part == "low_rank" else min(weight.shape))
            torch.testing.assert_close(got, wanted[: len(got)], rtol=1e-4, atol=1e-4)


def test_a_stack_has_spectra_of_each_matrix():
    model = Experts()
    slcompile.factorize_(model, slcompile.SLConfig(rank=4, seed=0), example_args=(torch.randn(3, 5, 64),))
    random_factors(model)
    found = slcompile.spectra(model)["w"]
    assert found.low_rank.shape == (3, 4)
    torch.testing.assert_close(found.weight, torch.linalg.svdvals(model.w.detach()), rtol=1e-4, atol=1e-4)


def test_the_effective_rank_counts_equal_directions():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(effective_rank(values), torch.tensor([4.0, 1.0, 0.0]))
    assert 1 < float(effective_rank(torch.tensor([1.0, 0.1]))) < math.e


def test_a_weight_at_its_start_has_no_low_rank_part():
    model = slcompile.factorize_(
        nn.Sequential(nn.Linear(64, 64)), slcompile.SLConfig(seed=0, init="kaiming", support="stratified")
    )
    found = slcompile.spectra(model)["0.weight"]
    assert found.effective_ranks["low_rank"] == 0
    assert found.effective_ranks["sparse"] == found.effective_ranks["weight"] > 20
    assert str(found).startswith("s B A: norm 0, effective rank 0.0 of 16, S: norm ")


def test_bfloat16_factors_are_widened():
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    random_factors(slcompile.factorize_(model, slcompile.SLConfig(seed=0)))
    found = slcompile.spectra(model)["0.weight"]
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(
        found.weight, torch.linalg.svdvals(model[0].weight_sl.merged_wide()), rtol=1e-4, atol=1e-3
    )


def test_a_dense_model_and_other_structures_are_refused():
    with pytest.raises(ValueError, match="model must have factorized weights, got Linear without one"):
        slcompile.spectra(nn.Linear(4, 4))
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), slcompile.SLConfig(structure="cp", rank=4))
    with pytest.raises(ValueError, match=r"0\.weight has no parts B, A and S: spectra are of structure"):
        slcompile.spectra(model)


@pytest.mark.parametrize("part", ["B", "A", "values"])
def test_factors_that_are_no_numbers_are_named(part):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), slcompile.SLConfig(seed=0))
    with torch.no_grad():
        getattr(model[1].weight_sl, part)[-1, -1] = math.nan
    with pytest.raises(ValueError, match=r"the factors of 1\.weight contain NaN or Inf"):
        slcompile.spectra(model)


def test_a_drawing_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="spectra must hold those of a weight, got"):
        plot_spectra({}, tmp_path / "spectra.png")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_drawing_has_a_panel_for_each_part_and_replaces_an_older_one(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 40))
    random_factors(slcompile.factorize_(model, slcompile.SLConfig(rank=8, seed=0)))
    target = tmp_path / f"spectra{suffix}"
    target.write_text("old")
    assert plot_spectra(slcompile.spectra(model), target) == target
    start = target.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in target.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == [target.name]
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        plot_spectra(slcompile.spectra(model), tmp_path / "spectra.pdf")
