from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import slcompile
from slcompile.config import SLConfig, did_you_mean


def test_defaults() -> None:
    assert dataclasses.asdict(SLConfig()) == {
        "rank": 0.25,
        "density": 0.03,
        "alpha": "auto",
        "support": "vector",
        "vector": 16,
        "init": "auto",
        "seed": None,
        "include": ("*",),
        "exclude": ("*lm_head*", "*embed*"),
        "min_dim": 32,
        "lowering": "auto",
        "keep_weights": False,
        "save": "auto",
        "memory_budget": None,
        "autotune": False,
        "dryrun": False,
        "structure": "sparse_low_rank",
        "blocks": None,
        "base": None,
        "skip_passes": (),
    }


BAD: dict[str, list[Any]] = {
    "rank": [0, -1, 1.0, 1.5, 0.0, -0.25, math.nan, math.inf, True, False, "8", None],
    "density": [0, 0.0, 1.5, -1, math.nan, math.inf, True, "0.03", None],
    "alpha": [0, -16, 2e9, 1e300, math.nan, math.inf, True, "16", None],
    "support": ["", "Stratified", "random", None, 1],
    "vector": [0, 3, -16, 256, 16.0, True, None, "16"],
    "init": ["", "svd", "Kaiming", None, 1],
    "seed": [-1, 2**63, 1.0, math.nan, True, "1"],
    "include": ["", [""], [1], ["a", None], None, 1, {"*": 1}],
    "exclude": ["", [""], [1], ["a", None], None, 1, {"*": 1}],
    "min_dim": [0, -1, 1.0, True, None],
    "lowering": ["", "Factored", "dense", None, 1],
    "keep_weights": [0, 1, None, "yes"],
    "save": ["", "Auto", "low-rank", None, True],
    "memory_budget": [0, -1, 0.5, True, math.nan, math.inf, "", "GB", "0GB", "-3GB", "6XB", "6 gigabytes", [1]],
    "autotune": [0, 1, None, "yes"],
    "dryrun": [0, 1, None, "yes"],
    "structure": ["", "Sparse_low_rank", "dense", None, 1],
    "base": ["", "Frozen", "dense", 1, True],
    "skip_passes": ["", "merge_weights", 1, {"lower_ops": 1}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_value_raises_and_names_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}\b") as error:
        SLConfig(**{field: value})
    # A pattern that was given as a string is shown as the sequence it stands for.
    assert repr(value) in str(error.value)


GOOD: dict[str, list[Any]] = {
    "rank": [1, 4096, 1e-6, 0.999],
    "density": [1, 1.0, 1e-9],
    "alpha": [1, 0.5, 1e9, "auto"],
    "support": ["stratified", "vector", "uniform", "largest"],
    "init": ["auto", "kaiming", "spectral"],
    "seed": [None, 0, 2**63 - 1],
    "min_dim": [1, 4096],
    "lowering": ["auto", "composed", "factored"],
    "keep_weights": [False, True],
    "save": ["auto", "all", "low_rank"],
    "memory_budget": [None, 1, 6_000_000_000],
    "autotune": [False, True],
    "dryrun": [False, True],
    "structure": ["sparse_low_rank"],
    "base": [None, "frozen"],
    "skip_passes": [(), ("lower_ops",), ("lower_ops", "choose_lowering")],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GOOD.items() for value in values])
def test_good_value_is_kept(field: str, value: Any) -> None:
    assert getattr(SLConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("6GB", 6_000_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("512mb", 512_000_000),
        (" 7 ", 7),
        ("80TB", 8 * 10**13),
        (2.5e9, 2_500_000_000),
    ],
)
def test_a_memory_budget_is_kept_in_bytes(given: Any, kept: int) -> None:
    config = SLConfig(memory_budget=given)
    assert config.memory_budget == config.budget == kept


def test_an_unknown_unit_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^memory_budget got '6GIGB' with the unit 'GIGB', did you mean 'G"):
        SLConfig(memory_budget="6GIGB")


@pytest.mark.parametrize("save", ["all", "low_rank"])
def test_a_memory_budget_with_another_choice_of_what_is_saved_raises(save: str) -> None:
    with pytest.raises(ValueError, match=f"^memory_budget=1000 needs save='auto', got save='{save}'"):
        SLConfig(memory_budget="1kB", save=save)


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16, 32, 64, 128])
def test_vector_lengths(vector: int) -> None:
    assert SLConfig(support="vector", vector=vector).vector == vector


@pytest.mark.parametrize("support", ["stratified", "uniform"])
def test_a_vector_length_for_another_support_raises(support: str) -> None:
    with pytest.raises(ValueError, match=f"^vector=64 needs support='vector', got support='{support}'"):
        SLConfig(support=support, vector=64)


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "kept"), [("a.*", ("a.*",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), ((), ())]
)
def test_patterns_are_kept_as_a_tuple(field: str, given: Any, kept: tuple[str, ...]) -> None:
    assert getattr(SLConfig(**{field: given}), field) == kept


@pytest.mark.parametrize(
    ("field", "typo", "nearest"),
    [
        ("support", "stratfied", "stratified"),
        ("support", "unifrom", "uniform"),
        ("support", "vectors", "vector"),
        ("lowering", "factorized", "factored"),
        ("init", "kaimin", "kaiming"),
        ("init", "spectrum", "spectral"),
    ],
)
def test_misspelt_choice_suggests_the_nearest(field: str, typo: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} got '{typo}', did you mean '{nearest}'"):
        SLConfig(**{field: typo})


def test_arguments_are_by_keyword_alone() -> None:
    with pytest.raises(TypeError):
        SLConfig(8)  # type: ignore[misc]  # the error is what is tested


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SLConfig().rank = 8  # type: ignore[misc]  # the error is what is tested


def test_equal_configs_have_equal_hashes() -> None:
    one, same, other = SLConfig(include=["a*"]), SLConfig(include=("a*",)), SLConfig(include="b*")
    assert one == same
    assert {one: 1}[same] == 1
    assert one != other


class TestFromOptions:
    @pytest.mark.parametrize("options", [None, {}])
    def test_no_options_are_the_defaults(self, options: dict[str, Any] | None) -> None:
        assert SLConfig.from_options(options) == (SLConfig(), {})

    def test_inductor_is_split_off_and_the_options_are_left_as_they_were(self) -> None:
        options = {"rank": 8, "include": ["layers.*"], "inductor": {"max_autotune": True}}
        before = dict(options)
        config, inductor = SLConfig.from_options(options)
        assert config == SLConfig(rank=8, include=("layers.*",))
        assert inductor == {"max_autotune": True}
        assert inductor is not options["inductor"]
        assert options == before

    @pytest.mark.parametrize(
        ("key", "nearest"),
        [
            ("rnak", "rank"),
            ("desnity", "density"),
            ("aplha", "alpha"),
            ("includes", "include"),
            ("inducter", "inductor"),
        ],
    )
    def test_unknown_key_suggests_the_nearest(self, key: str, nearest: str) -> None:
        with pytest.raises(ValueError, match=f"unknown option '{key}', did you mean '{nearest}'"):
            SLConfig.from_options({key: 1})

    def test_unknown_key_lists_what_is_allowed(self) -> None:
        with pytest.raises(
            ValueError, match=r"unknown option 'zzz'; allowed: rank, density, .*, min_dim, .*, inductor$"
        ):
            SLConfig.from_options({"zzz": 1})

    def test_key_that_is_no_string_is_unknown(self) -> None:
        with pytest.raises(ValueError, match="unknown option 3"):
            SLConfig.from_options({3: 1})  # type: ignore[dict-item]  # the error is what is tested

    @pytest.mark.parametrize("value", [None, True, "max_autotune", ["max_autotune"]])
    def test_inductor_must_be_a_dict(self, value: Any) -> None:
        with pytest.raises(ValueError, match="option 'inductor' must be a dict"):
            SLConfig.from_options({"inductor": value})

    def test_bad_value_names_the_field(self) -> None:
        with pytest.raises(ValueError, match=r"^rank must be"):
            SLConfig.from_options({"rank": 0})


class TestRankFor:
    @pytest.mark.parametrize(
        ("rank", "shape", "expected"),
        [
            (0.25, (64, 128), 16),
            (0.25, (128, 64), 16),
            (0.25, (63, 63), 16),
            (0.001, (64, 64), 1),
            (0.999, (64, 64), 64),
            (8, (64, 128), 8),
            (512, (64, 128), 512),
        ],
    )
    def test_fraction_is_of_the_smaller_side_and_an_int_is_itself(
        self, rank: float, shape: tuple[int, int], expected: int
    ) -> None:
        found = SLConfig(rank=rank).rank_for(*shape)
        assert found == expected
        assert isinstance(found, int)


class TestPatterns:
    @pytest.mark.parametrize(
        ("include", "exclude", "name", "expected"),
        [
            (("*",), (), "layers.0.q.weight", True),
            (("*",), ("*q*",), "layers.0.q.weight", False),
            (("layers.0.*", "head*"), (), "head.weight", True),
            (("layers.0.*",), (), "layers.1.q.weight", False),
            (("layers.[01].*",), (), "layers.1.q.weight", True),
            (("q",), (), "layers.0.q.weight", False),
            (("*Q*",), (), "layers.0.q.weight", False),
            ((), (), "layers.0.q.weight", False),
        ],
    )
    def test_includes(self, include: tuple[str, ...], exclude: tuple[str, ...], name: str, expected: bool) -> None:
        assert SLConfig(include=include, exclude=exclude).includes(name) is expected

    @pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "embeddings.word.weight"])
    def test_head_and_embeddings_are_excluded_by_default(self, name: str) -> None:
        assert not SLConfig().includes(name)

    def test_default_patterns_that_match_nothing_raise_nothing(self) -> None:
        SLConfig().require_patterns_match(["fc.weight"])
        SLConfig(exclude=("*lm_head*", "*embed*")).require_patterns_match(["fc.weight"])
        SLConfig().require_patterns_match([])

    def test_users_patterns_that_match_raise_nothing(self) -> None:
        names = iter(["fc.weight", "head.weight"])  # an iterator: both fields must see all of it
        SLConfig(include=("fc*",), exclude=("head*",)).require_patterns_match(names)

    @pytest.mark.parametrize("field", ["include", "exclude"])
    def test_users_pattern_that_matches_nothing_raises_and_suggests(self, field: str) -> None:
        config = SLConfig(**{field: ("*", "*layers.0.qproj*")})
        with pytest.raises(ValueError, match=rf"^{field} pattern .*qproj.*did you mean 'layers\.0\.q_proj'"):
            config.require_patterns_match(["layers.0.q_proj", "layers.0.k_proj"])

    def test_one_that_matches_does_not_excuse_one_that_does_not(self) -> None:
        with pytest.raises(ValueError, match=r"^include pattern 'decoder\.\*'"):
            SLConfig(include=("encoder.*", "decoder.*")).require_patterns_match(["encoder.weight"])


class TestDidYouMean:
    def test_nothing_near_and_many_known_is_silent(self) -> None:
        assert did_you_mean("zzz", map(str, range(25))) == ""

    def test_few_known_are_listed(self) -> None:
        assert did_you_mean("raank", ["rank", "alpha"]) == ", did you mean 'rank'?; allowed: rank, alpha"


@pytest.mark.parametrize("inputs", [1, 48, 128, 344, 2048, 5461])
@pytest.mark.parametrize("rank", [1, 12, 32, 512])
def test_the_scale_of_alpha_auto_is_kept_to_the_bit_by_alpha(rank: int, inputs: int) -> None:
    scale = SLConfig(alpha="auto").scale_for(rank, inputs)
    assert scale > 0
    assert SLConfig(alpha=scale * rank).scale_for(rank, inputs) == scale


def aligned_step(scale: float, rank: int, inputs: int) -> float:
    """What an output changes by in a step of rate 1 whose signs agree with inputs of size 1: the dense one's is n."""
    torch.manual_seed(0)
    A = torch.empty(rank, inputs).uniform_(-1, 1) / math.sqrt(inputs)
    return scale * math.sqrt(rank * inputs) * float(torch.linalg.matrix_norm(A, 2))


@pytest.mark.parametrize(("rank", "inputs", "dense"), [(16, 64, 64), (32, 128, 128), (128, 512, 128), (128, 1376, 128)])
def test_a_step_at_the_scale_of_alpha_auto_is_a_dense_one_up_to_128_inputs(rank: int, inputs: int, dense: int) -> None:
    scale = SLConfig(alpha="auto").scale_for(rank, inputs)
    assert aligned_step(scale, rank, inputs) == pytest.approx(dense, rel=0.1)  # A's norm is that of large matrices


def test_the_scale_beside_a_base_is_loras() -> None:
    assert SLConfig(alpha="auto", base="frozen").scale_for(16, 384) == 2
    assert SLConfig(alpha=48, base="frozen").scale_for(16, 384) == 3


def test_a_dry_run_is_not_factorized() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match="config must not have dryrun=True, which replaces nothing"):
        slcompile.factorize_(model, SLConfig(dryrun=True))
    assert not slcompile.factors(model)
