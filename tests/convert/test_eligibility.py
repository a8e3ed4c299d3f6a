from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slcompile.config import SLConfig
from slcompile.convert.eligibility import decide, require_possible_rank
from slcompile.passes import Decision
from slcompile.passes.find_matmuls import WeightUse

CONFIG = SLConfig()
LINEAR = nn.Linear(1, 1)


def used_by(matmuls: int = 1, others: tuple[str, ...] = ()) -> WeightUse:
    return WeightUse(["mm"] * matmuls, list(others))


def parameter(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=requires_grad)


def decision_on(
    weight: Tensor,
    use: WeightUse | None = None,
    config: SLConfig = CONFIG,
    owners: tuple[nn.Module, ...] = (LINEAR,),
    names: tuple[str, ...] = ("fc.weight",),
) -> Decision:
    return decide(names, weight, used_by() if use is None else use, config, owners)


def test_eligible_weight_has_no_reason() -> None:
    assert decision_on(parameter(64, 128), used_by(3)) == Decision("fc.weight", "", "", (64, 128), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_point_type_is_eligible(dtype: torch.dtype) -> None:
    assert decision_on(parameter(64, 64, dtype=dtype)).reason == ""


# reason: (weight, other arguments, what its detail must say)
LEFT: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "no_matmul": (parameter(64, 64), {"use": used_by(0, ("sum", "mul", "sum"))}, "read by mul, sum, not by a matmul"),
    "tied": (parameter(64, 64), {"use": used_by(1, ("embedding",))}, "embedding"),
    "other_use": (parameter(64, 64), {"use": used_by(1, ("sum", "mul", "sum"))}, "also read by mul, sum"),
    "not_2d": (parameter(4, 64, 64), {}, "3 dimensions"),
    "dtype": (parameter(64, 64, dtype=torch.int8, requires_grad=False), {}, "torch.int8"),
    "frozen": (parameter(64, 64, requires_grad=False), {}, "requires_grad is False"),
    "no_grad": (parameter(64, 64), {"use": WeightUse(["mm"], without_grad=True)}, "no_grad"),
    "not_owned": (parameter(64, 64), {"owners": ()}, "no module holds it"),
    "excluded": (parameter(64, 64), {"names": ("lm_head.weight",)}, "patterns"),
    "too_small": (parameter(31, 512), {}, "fewer than 32"),
    "no_saving": (parameter(64, 64), {"config": SLConfig(rank=32)}, "its factors take 4224 parameters at this rank"),
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT)
def test_weight_that_is_left_has_its_reason_and_a_sentence(reason: str) -> None:
    weight, arguments, detail = LEFT[reason]
    decision = decision_on(weight, **arguments)
    assert decision.reason == reason
    assert detail in decision.detail
    assert decision.shape == tuple(weight.shape)


def test_weight_that_nothing_reads_says_so() -> None:
    decision = decision_on(parameter(64, 64), used_by(0))
    assert (decision.reason, decision.detail) == ("no_matmul", "read by nothing, not by a matmul")


@pytest.mark.parametrize("owner", [nn.Embedding(64, 64), nn.EmbeddingBag(64, 64)])
def test_table_of_an_embedding_is_tied_though_this_graph_does_not_show_it(owner: nn.Module) -> None:
    assert decision_on(parameter(64, 64), owners=(nn.Linear(64, 64), owner)).reason == "tied"
    assert decision_on(parameter(64, 64), owners=(nn.Linear(64, 64),)).reason == ""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (SLConfig(include="other.*"), "excluded"),
        (SLConfig(exclude="fc.*"), "excluded"),
        (SLConfig(include="fc.*"), ""),
        (SLConfig(exclude="other.*"), ""),
    ],
)
def test_patterns(config: SLConfig, reason: str) -> None:
    assert decision_on(parameter(64, 64), config=config).reason == reason


@pytest.mark.parametrize(
    ("shape", "min_dim", "reason"),
    [
        ((32, 32), 32, ""),
        ((31, 32), 32, "too_small"),
        ((32, 31), 32, "too_small"),
        ((8, 8), 8, ""),
        ((64, 64), 65, "too_small"),
    ],
)
def test_min_dim_is_of_the_smaller_side(shape: tuple[int, int], min_dim: int, reason: str) -> None:
    assert decision_on(parameter(*shape), config=SLConfig(min_dim=min_dim)).reason == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # 64x64 is 4096: rank 31 takes 3968, and stratified density 1/64 one more in each row.
        (SLConfig(rank=31, density=1 / 64), ""),
        (SLConfig(rank=31, density=2 / 64), "no_saving"),
        (SLConfig(rank=31, density=127 / 4096, support="uniform"), ""),
        (SLConfig(rank=31, density=128 / 4096, support="uniform"), "no_saving"),
        (SLConfig(rank=1, density=1.0), "no_saving"),
    ],
)
def test_factors_must_be_fewer_than_the_dense_weight(config: SLConfig, reason: str) -> None:
    assert decision_on(parameter(64, 64), config=config).reason == reason


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ({"use": used_by(0, ("embedding",)), "owners": (nn.Embedding(2, 2),)}, "no_matmul"),
        ({"use": used_by(1, ("embedding", "sum"))}, "tied"),
        ({"use": used_by(1, ("sum",))}, "other_use"),
        ({}, "not_2d"),
    ],
)
def test_the_first_reason_is_given(arguments: dict[str, Any], first: str) -> None:
    worst = parameter(2, 2, 2, dtype=torch.int8, requires_grad=False)
    assert decision_on(worst, names=("lm_head.weight",), **arguments).reason == first


def test_reasons_that_concern_the_weight_come_in_their_order() -> None:
    assert decision_on(parameter(2, 2, dtype=torch.int8, requires_grad=False), names=("lm_head",)).reason == "dtype"
    assert decision_on(parameter(2, 2, requires_grad=False), names=("lm_head",)).reason == "frozen"
    assert decision_on(parameter(2, 2), names=("lm_head",)).reason == "too_small"
    assert decision_on(parameter(2, 2), names=("lm_head",), config=SLConfig(min_dim=1, rank=2)).reason == "no_saving"
    assert decision_on(parameter(64, 64), names=("lm_head",), owners=()).reason == "not_owned"
    assert decision_on(parameter(64, 64), names=("lm_head",), owners=(nn.Embedding(1, 1),)).reason == "tied"


def test_all_names_of_a_tied_weight_count() -> None:
    names = ("0.weight", "1.weight")
    assert decision_on(parameter(64, 64), names=names, config=SLConfig(exclude=("1.*",))).reason == "excluded"
    assert decision_on(parameter(64, 64), names=names, config=SLConfig(include=("1.*",))).reason == ""


def test_a_weight_on_meta_is_decided_by_its_shape() -> None:
    weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    assert decision_on(weight).reason == ""


class TestRequirePossibleRank:
    def test_rank_above_every_weight_raises_and_says_what_is_possible(self) -> None:
        with pytest.raises(ValueError, match=r"^rank must be at most 64, .* got 100$"):
            require_possible_rank([(48, 48), (4, 64, 96)], SLConfig(rank=100))

    @pytest.mark.parametrize(
        ("shapes", "rank"), [([(48, 48), (512, 512)], 100), ([], 100), ([(64, 64)], 0.9), ([(64, 64)], 64)]
    )
    def test_rank_that_fits_a_weight_raises_nothing(self, shapes: list[tuple[int, int]], rank: float) -> None:
        require_possible_rank(shapes, SLConfig(rank=rank))
