from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.ops import compose
from slcompile.ops.support import flat_positions, groups_per_row, uniform_index
from slcompile.weight.start import TRAINED_RATIO, looks_trained, spectral_factors

SHAPES = [(256, 256), (512, 128), (64, 2048), (32, 32)]

INITIALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": partial(nn.init.normal_, std=0.02),
    "uniform": partial(nn.init.uniform_, a=-0.1, b=0.1),
    "truncated normal": partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "kaiming uniform": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "kaiming normal": nn.init.kaiming_normal_,
    "xavier uniform": nn.init.xavier_uniform_,
    "xavier normal": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "shifted mean": partial(nn.init.normal_, mean=1.0, std=0.02),
    "positive": partial(nn.init.uniform_, a=0.0, b=1.0),
}


def random_weight(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edge(weight: Tensor) -> float:
    """Where the singular values of independent entries of this weight's variance end."""
    return float(weight.std()) * (math.sqrt(weight.shape[0]) + math.sqrt(weight.shape[1]))


def with_a_learned_direction(shape: tuple[int, int], strength: float, seed: int) -> Tensor:
    """Random entries plus one direction whose singular value is ``strength`` edges."""
    weight = random_weight(shape, seed)
    left = nn.functional.normalize(random_weight((shape[0], 1), seed + 100), dim=0)
    right = nn.functional.normalize(random_weight((1, shape[1]), seed + 200), dim=1)
    return weight + strength * edge(weight) * left @ right


class TestLooksTrained:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", INITIALISERS)
    def test_initialised_weight_does_not(self, name: str, shape: tuple[int, int]) -> None:
        for seed in range(3):
            torch.manual_seed(seed)
            assert not looks_trained(INITIALISERS[name](torch.empty(shape)))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1 / 3])
    def test_constant_weight_does_not(self, value: float, shape: tuple[int, int]) -> None:
        assert not looks_trained(torch.full(shape, value))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_random_weight_with_a_strong_low_rank_part_does(self, shape: tuple[int, int]) -> None:
        for seed in range(5):
            # The direction adds to the variance, and so to the edge: twice the ratio stays above it at every shape.
            assert looks_trained(with_a_learned_direction(shape, 2 * TRAINED_RATIO, seed))
            low_rank = random_weight((shape[0], 4), seed) @ random_weight((4, shape[1]), seed + 1)
            assert looks_trained(random_weight(shape, seed + 2) + low_rank)

    def test_shifted_mean_hides_no_learned_direction(self) -> None:
        assert looks_trained(with_a_learned_direction((256, 256), 2 * TRAINED_RATIO, 0) + 10.0)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_direction_within_the_noise_does_not(self, shape: tuple[int, int]) -> None:
        # A direction of half an edge raises the largest singular value by less than the margin that random ones have.
        assert not any(looks_trained(with_a_learned_direction(shape, 0.5, seed)) for seed in range(5))

    def test_scale_of_the_weight_does_not_matter(self) -> None:
        random, trained = random_weight((256, 128), 0), with_a_learned_direction((256, 128), 2 * TRAINED_RATIO, 0)
        for scale in (1e-6, 1e-3, 1e3):
            assert not looks_trained(scale * random)
            assert looks_trained(scale * trained)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_low_precision(self, dtype: torch.dtype) -> None:
        assert not looks_trained(random_weight((256, 128), 0).to(dtype))
        assert looks_trained(with_a_learned_direction((256, 128), 2 * TRAINED_RATIO, 0).to(dtype))

    def test_parameter_that_requires_grad_is_read_alone(self) -> None:
        weight = nn.Parameter(random_weight((64, 64), 0))
        before = weight.detach().clone()
        looks_trained(weight)
        assert torch.equal(weight, before)
        assert weight.grad is None

    def test_default_generator_is_left_where_it_was(self) -> None:
        before = torch.get_rng_state()
        looks_trained(random_weight((64, 64), 0))
        assert torch.equal(torch.get_rng_state(), before)

    def test_default_device_is_not_followed(self) -> None:
        weight = random_weight((64, 64), 0)
        with torch.device("meta"):
            assert not looks_trained(weight)


class TestSpectralFactors:
    RANK, SCALE, DENSITY = 16, 0.5, 0.05
    VECTOR: ClassVar = {"stratified": 1, "vector": 16, "uniform": 1}

    def factors(
        self, weight: Tensor, support: str, rank: int = RANK, scale: float = SCALE
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        rows, columns = weight.shape
        if support == "uniform":
            where = uniform_index(3, rows, columns, self.DENSITY)
            values = torch.empty(where.shape)
        else:
            where, values = torch.tensor([3]), torch.empty(rows, groups_per_row(columns, self.DENSITY))
        torch.manual_seed(0)  # the SVD is a randomised one
        return spectral_factors(weight, rank, scale, values, where, self.VECTOR[support]), where

    @staticmethod
    def weights() -> dict[str, Tensor]:
        decaying = torch.linspace(1, 0, 96) ** 3
        left, right = (torch.linalg.qr(random_weight((size, 96), size)).Q for size in (128, 96))
        return {
            "random": random_weight((128, 96), 0),
            "wide": random_weight((63, 257), 1),
            "decaying spectrum": left * decaying @ right.T,
            "learned direction": with_a_learned_direction((128, 96), 3.0, 2),
        }

    @pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
    @pytest.mark.parametrize("name", ["random", "wide", "decaying spectrum", "learned direction"])
    def test_error_is_near_the_optimum_and_the_residual_lowers_it(self, name: str, support: str) -> None:
        weight = self.weights()[name]
        (B, A, values), where = self.factors(weight, support)
        optimum = float(torch.linalg.svdvals(weight)[self.RANK :].norm())
        low_rank_error = float((weight - self.SCALE * B @ A).norm())
        # A randomised SVD of four power iterations, 8 columns oversampled: within 2 % even of a flat spectrum.
        assert optimum * (1 - 1e-5) <= low_rank_error <= 1.02 * optimum
        error = float((weight - compose(B, A, values, where, self.SCALE, vector=self.VECTOR[support])).norm())
        # The residual is removed at a random 5 % of the entries: that share of its square, here at least half of it.
        share = values.numel() / weight.numel()
        assert error**2 <= (1 - share / 2) * low_rank_error**2

    @pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
    def test_entries_at_the_support_are_the_weights(self, support: str) -> None:
        weight = random_weight((128, 96), 0)
        (B, A, values), where = self.factors(weight, support)
        at = flat_positions(values, where, 96, self.VECTOR[support]).long()
        found, expected = (
            compose(B, A, values, where, self.SCALE, vector=self.VECTOR[support]).flatten()[at],
            weight.flatten()[at],
        )
        # The low-rank part, a sum of RANK products, is subtracted once and added once.
        magnitude = (self.SCALE * B.abs() @ A.abs() + weight.abs()).flatten()[at]
        bound = 2 * (self.RANK + 2) * torch.finfo(torch.float32).eps * magnitude
        assert bool(((found - expected).abs() <= bound).all())

    @pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_shapes_and_dtype(self, dtype: torch.dtype, support: str) -> None:
        (B, A, values), where = self.factors(random_weight((63, 257), 1).to(dtype), support, rank=7)
        assert B.shape == (63, 7)
        assert A.shape == (7, 257)
        assert values.shape == (where.shape if support == "uniform" else (63, 13))
        assert B.dtype == A.dtype == values.dtype == torch.float32

    def test_scale_is_divided_out_evenly(self) -> None:
        weight = random_weight((64, 48), 0)
        (B, A, values), _ = self.factors(weight, "stratified", scale=1.0)
        (scaled_B, scaled_A, scaled_values), _ = self.factors(weight, "stratified", scale=16.0)
        # Both factors shrink by sqrt(16), a power of two: no bit of them is lost.
        assert torch.equal(4 * scaled_B, B)
        assert torch.equal(4 * scaled_A, A)
        magnitude = float((B.abs() @ A.abs()).max())
        bound = 2 * (self.RANK + 2) * torch.finfo(torch.float32).eps * magnitude
        assert float((scaled_values - values).abs().max()) <= bound

    def test_factors_share_the_singular_values_evenly(self) -> None:
        (B, A, _), _ = self.factors(random_weight((64, 48), 0), "stratified")
        # Columns of U and V have norm 1 to rounding of the QR decompositions behind them.
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-5, atol=0.0)

    def test_full_rank_is_exact(self) -> None:
        weight = random_weight((24, 20), 0)
        (B, A, _), _ = self.factors(weight, "stratified", rank=20)
        # The SVD's backward error: a small multiple of eps times the largest singular value.
        bound = 20 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(weight, 2))
        assert float(torch.linalg.matrix_norm(weight - self.SCALE * B @ A, 2)) <= bound

    def test_zero_weight_has_zero_factors(self) -> None:
        (B, A, values), where = self.factors(torch.zeros(40, 30), "stratified")
        assert not compose(B, A, values, where, self.SCALE).any()

    def test_parameter_that_requires_grad_gives_plain_tensors(self) -> None:
        found, _ = self.factors(nn.Parameter(random_weight((40, 30), 0)), "stratified")
        assert not any(each.requires_grad for each in found)


@pytest.mark.parametrize(
    "options",
    [{"rank": 16}, {"rank": 16, "support": "largest"}]
    + [{"rank": 12, "structure": each} for each in ("block_low_rank", "cp", "tensor_train")],
    ids=str,
)
def test_a_conversion_within_autocast_approximates_as_well(block_class, options):
    models = []
    for enabled in (False, True):
        torch.manual_seed(0)
        models.append(block_class())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            slcompile.factorize_(models[-1], slcompile.SLConfig(init="spectral", seed=0, **options))
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in models), strict=True))
