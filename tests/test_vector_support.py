"""A model whose weights have the vector support: what its state says, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import slcompile
from tests.testing import some_of

CONFIG = {"rank": 8, "density": 0.05, "seed": 1}


def factorized(model: torch.nn.Module, support: str = "vector", vector: int = 16) -> torch.nn.Module:
    return slcompile.factorize_(model, slcompile.SLConfig(support=support, vector=vector, **CONFIG))


def test_rows_of_a_block_share_their_columns_and_the_last_block_is_shorter():
    model = factorized(torch.nn.Sequential(torch.nn.Linear(64, 72, bias=False)), vector=16)
    S = model[0].weight != 0  # B is zero
    assert all(bool((S[first : first + 16] == S[first]).all()) for first in range(0, 72, 16))
    assert len({tuple(S[first].tolist()) for first in range(0, 72, 16)}) == 5
    assert model[0].weight_sl.values.shape == (72, 3)


def test_one_row_a_block_is_the_stratified_support_with_the_same_state(block_class):
    torch.manual_seed(0)
    one = factorized(block_class(), vector=1)
    torch.manual_seed(0)
    other = factorized(block_class(), "stratified")
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert torch.equal(one.up.weight, other.up.weight)
    other.load_state_dict(one.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("held", "loading"), [(("vector", 16), ("vector", 32)), (("vector", 16), ("stratified", 16)),
                          (("stratified", 16), ("vector", 16))],
)  # fmt: skip
def test_a_state_dict_of_another_length_is_refused_and_says_which(block_class, held, loading, strict):
    state, model = factorized(block_class(), *held).state_dict(), factorized(block_class(), *loading)
    length = held[1] if held[0] == "vector" else 1
    with pytest.raises(RuntimeError, match=rf"up\.weight_sl\.values are of blocks of vector={length} rows"):
        model.load_state_dict(state, strict=strict)
    factorized(block_class(), *held).load_state_dict(state)


def test_copies_pickles_and_descriptions_keep_the_length(block, tmp_path):
    weight = factorized(block, vector=32).up.weight_sl
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(twin(), weight())
    again = type(weight).from_description(weight.shape, weight.describe(), name="", dtype=weight.dtype)
    again.load_state_dict(weight.state_dict())
    assert torch.equal(again(), weight())
    assert "vector=32" in repr(weight)


def test_an_overwritten_length_is_found(block):
    weight = factorized(block).up.weight_sl
    weight.rows_of_block.fill_(3)
    with pytest.raises(RuntimeError, match="rows_of_block holds 3 but this weight has vector=16"):
        weight.merged()
    weight.reset_parameters()
    weight.merged()


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_training_and_inference_are_as_exact_as_eager(assert_eager, block, batch, lowering):
    options = {**CONFIG, "support": "vector", "vector": 32, "lowering": lowering, "init": "kaiming"}
    compiled = torch.compile(block, backend="sltrain", options=options)
    compiled(batch[0]).sum().backward()
    assert_eager(compiled, block, [batch[0]])
    with torch.no_grad():
        for tokens in (1, 3, 32):
            found, expected = compiled(batch[0][:tokens]), block(batch[0][:tokens])
            # Sums of at most 96 terms of about 1, twice.
            assert float((found - expected).norm()) <= 2**-20 * float(expected.norm())


@pytest.mark.slow
def test_the_estimator_knows_what_is_kept_of_a_support(block, batch):
    options = {**CONFIG, "support": "vector", "lowering": "factored"}
    report = slcompile.estimate_memory(block, (batch[0],), config=slcompile.SLConfig(**options), device="cpu")
    # An int32 for the 16 rows of a block: weights of 96, 64 and 64 rows with 3, 5 and 3 groups.
    assert report.sltrain.largest["indices"] == 4 * (6 * 3 + 4 * 5 + 4 * 3)
    assert report.low_rank.largest["indices"] == 0
