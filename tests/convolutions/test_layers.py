"""The weights of convolutions as matrices [out, in * kernel]: found, factorized, and computed with in every layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slcompile
from tests.convolutions.models import CONFIG, OPTIONS, by_formula, factorized, require_near, results
from tests.testing import LITE, some_of

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(10, 24, 5, stride=2, padding=3, dilation=2), (3, 10, 33)),
    "2d": (lambda: nn.Conv2d(10, 24, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 10, 9, 11)),
    "3d": (lambda: nn.Conv3d(6, 24, (1, 3, 2), bias=False), (2, 6, 3, 5, 4)),
    "same": (lambda: nn.Conv2d(10, 24, (3, 4), padding="same"), (2, 10, 7, 5)),
    "reflected": (lambda: nn.Conv2d(10, 24, 3, padding=2, padding_mode="reflect"), (2, 10, 7, 5)),
    "circular": (lambda: nn.Conv1d(10, 24, 3, padding=1, padding_mode="circular"), (2, 10, 7)),
    "patches": (lambda: nn.Conv2d(3, 24, 4, stride=4), (2, 3, 8, 12)),
    "one by one": (lambda: nn.Conv2d(20, 24, 1), (2, 20, 3, 5)),
    "one by one, 1d": (lambda: nn.Conv1d(20, 24, 1, bias=False), (2, 20, 7)),
    "one by one, strided": (lambda: nn.Conv2d(20, 24, 1, stride=2), (2, 20, 5, 5)),
    "without a batch": (lambda: nn.Conv2d(20, 24, 3), (20, 5, 5)),
}
RUNS = [(layer, "composed", "contiguous") for layer in LAYERS]
RUNS += [("2d", "composed", "channels_last"), ("one by one", "factored", "contiguous")]
RUNS += [("one by one", "factored", "channels_last"), ("one by one, 1d", "factored", "contiguous")]
# Another kind of padding and another 1x1 are there, too.
FIRST = [each for each in RUNS if each[0] not in ("reflected", "one by one, strided")]


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "lowering", "memory"), some_of(RUNS, FIRST))
def test_what_a_compiled_layer_computes_is_the_formula_in_float64(layer: str, lowering: str, memory: str) -> None:
    make, size = LAYERS[layer]
    model, x = factorized(make), torch.randn(size)
    if memory == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    lite = {} if layer == "reflected" else LITE  # in which torch's own gradient of reflecting has wrong strides
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, **lite, "lowering": lowering})
    require_near(results(model, compiled, x), by_formula(model, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["1d", "2d", "3d", "one by one"])
def test_the_first_training_step_converts(layer: str) -> None:
    make, size = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    dense = model[0].weight
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, **LITE})
    x = torch.randn(size)
    found = results(model, compiled, x)[:2]
    weight = model[0].weight_sl
    assert (weight.shape, weight.stored_shape) == ((24, dense[0].numel()), tuple(dense.shape))
    assert model[0].weight.shape == dense.shape
    require_near(found, by_formula(model, x)[:2])
    assert [each.shape for each in slcompile.last_report().replaced] == [tuple(dense.shape)]


class Reads(nn.Module):
    def __init__(self, size: tuple[int, ...], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(size) / 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


X = torch.randn(2, 20, 6, 6, generator=torch.Generator().manual_seed(1))
READS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], str]] = {
    "function": ((24, 20, 3, 3), lambda x, w: F.conv2d(x, w), ""),
    "by keywords": ((24, 20, 3, 3), lambda x, w: F.conv2d(input=x, weight=w, padding=1), ""),
    "torch.convolution": (
        (24, 20, 3, 3), lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), ""
    ),
    "twice": ((24, 20, 3, 3), lambda x, w: F.conv2d(x, w) + F.conv2d(-x.tanh(), w), ""),
    "cast": ((24, 20, 3, 3), lambda x, w: F.conv2d(x.double(), w.double()).float(), ""),
    "groups": ((40, 10, 3, 3), lambda x, w: F.conv2d(x, w, groups=2), "a convolution of 2 groups"),
    "transposed": ((20, 24, 3, 3), lambda x, w: F.conv_transpose2d(x, w), "a transposed convolution"),
    "turned": ((20, 20, 1, 1), lambda x, w: F.conv2d(x, w.transpose(0, 1)), "convolution"),
    "a part": ((48, 20, 3, 3), lambda x, w: F.conv2d(x, w[:24]), "convolution"),
    "a matrix": ((24, 20), lambda x, w: F.conv2d(x, w[:, :, None, None]), "convolution"),
    "standardized": ((24, 20, 3, 3), lambda x, w: F.conv2d(x, w - w.mean()), "mean, sub"),
    "a matmul, too": (
        (24, 20, 1, 1), lambda x, w: F.conv2d(x, w) + (w.flatten(1) @ x.flatten(2)).unflatten(2, (6, 6)), "mm"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reads", READS)
def test_which_convolutions_count(reads: str) -> None:
    size, function, others = READS[reads]
    model = nn.Sequential(Reads(size, function), nn.Flatten(), nn.LazyLinear(32))
    model(X)
    if others:
        with pytest.raises(ValueError, match="no eligible weight"):
            slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS, include=("0.w",)), example_args=(X,))
        uses = slcompile.convert.weight_uses.captured_uses(model, [((X,), {})])
        (use,) = (use for weight, use in uses if weight is model[0].w)
        assert ", ".join(sorted(set(use.others))) == others
    else:
        slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS, include=("0.w",)), example_args=(X,))
        assert model[0].w_sl.stored_shape == size


def test_modules_say_it_without_a_graph() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4), nn.Conv2d(32, 32, 3, groups=4), nn.ConvTranspose2d(32, 32, 3), nn.Conv1d(20, 32, 1)
    )
    slcompile.factorize_(model, CONFIG)
    assert sorted(slcompile.factors(model)) == ["0.weight", "3.weight"]
    left = {each.name: each.detail for each in slcompile.last_report().left}
    assert left == {
        "1.weight": "read by a convolution of 4 groups, not by a matmul",
        "2.weight": "read by a transposed convolution, not by a matmul",
    }
    small = nn.Sequential(nn.Conv2d(2, 64, 3))
    with pytest.raises(ValueError, match="too_small"):  # 18 columns
        slcompile.factorize_(small, slcompile.SLConfig(rank=2, min_dim=32))


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["auto", "factored"], ["auto"]))
def test_batch_and_pictures_of_any_size(lowering: str) -> None:
    model = factorized(lambda: nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.Tanh(), nn.Conv2d(20, 24, 1)))
    compiled = torch.compile(model, backend="sltrain", dynamic=True, options={**OPTIONS, **LITE, "lowering": lowering})
    for size in ((2, 3, 5, 7), (3, 3, 8, 6)):
        x = torch.randn(size)
        require_near(results(model, compiled, x), by_formula(model, x))
