"""The weights of convolutions as matrices [out, in * kernel]: found, factorized, computed with, written and read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import slcompile
from slcompile.health import composed_by_formula
from tests.testing import LITE, aten_kernels, process_group, randomize

OPTIONS: dict[str, Any] = {"rank": 6, "density": 0.05, "seed": 1, "min_dim": 16}
CONFIG = slcompile.SLConfig(**OPTIONS)

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


def factorized(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    slcompile.factorize_(model, slcompile.SLConfig(**{**OPTIONS, **options}))
    return randomize(model, 0.2)


def results(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """What a model gives for x, the gradient of x and those of its parameters."""
    x = x.clone().requires_grad_()
    y = run(x)
    parts = [each for each in model.parameters() if each.requires_grad]
    wave = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * wave).sum(), [x, *parts])]


def by_formula(model: nn.Module, x: Tensor) -> list[Tensor]:
    wide = composed_by_formula(copy.deepcopy(model).double())
    return results(wide, wide, x.double())


def require_near(found: list[Tensor], truth: list[Tensor]) -> None:
    for each, true in zip(found, truth, strict=True):
        assert float((each - true).norm()) <= 3e-6 * float(true.norm())


RUNS = [(layer, "composed", "contiguous") for layer in LAYERS]
RUNS += [("2d", "composed", "channels_last"), ("one by one", "factored", "contiguous")]
RUNS += [("one by one", "factored", "channels_last"), ("one by one, 1d", "factored", "contiguous")]


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "lowering", "memory"), RUNS)
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


def reasons(model: nn.Module, *args: Tensor, **options: Any) -> dict[str, str]:
    config = slcompile.SLConfig(**{**OPTIONS, **options})
    return {row.name: row.reason or row.decision for row in slcompile.explain(model, args, config=config).matmuls}


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
        uses = slcompile.convert.weight_uses.captured_uses(model, (X,), {})
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


class Unet(nn.Module):
    """A denoiser of one channel in small: down, attention at the lower size, up with a skip, steps added between."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.enter, self.leave = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.qkv, self.proj = nn.Conv2d(2 * width, 6 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, each) for each in (width, 2 * width, width))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        angles = steps[:, None] * torch.logspace(0, -3, 16, dtype=x.dtype)
        moved = self.steps(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None]
        x = self.enter(x)
        x = skip = x + self.second(F.silu(self.first(F.silu(self.norms[0](x)))))
        x = self.down(x)
        x = x + self.middle(F.silu(self.norms[1](x) + moved))
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(*(each.mT.unsqueeze(1) for each in (q, k, v))).squeeze(1).mT
        x = x + self.proj(mixed.unflatten(2, x.shape[2:]))
        x = torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1)
        return self.leave(F.silu(self.norms[2](self.up(x))))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "num_labels": 10}
    return ConvNextForImageClassification(ConvNextConfig(**sizes))


PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
NOISY = {"x": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), "steps": torch.tensor([3.0, 40.0])}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int, dict[str, str]]] = {
    # The patches are excluded by their name, "embeddings"; the classifier has 10 rows.
    "resnet": (resnet, PIXELS, 5, {"excluded": "resnet.embedder.embedder.convolution", "too_small": "classifier.1"}),
    "convnext": (convnext, PIXELS, 5, {"excluded": "convnext.embeddings.patch_embeddings", "too_small": "classifier"}),
    "unet": (Unet, NOISY, 10, {"too_small": "leave"}),
}


ONCE = [("resnet", "composed"), ("convnext", "factored"), ("unet", "factored")]
AGAIN = [("resnet", "factored"), ("convnext", "composed"), ("unet", "composed")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lowering"), [*ONCE, *(pytest.param(*each, marks=pytest.mark.long) for each in AGAIN)]
)
def test_a_model_trains_as_by_the_formula_in_float64(name: str, lowering: str) -> None:
    with aten_kernels():  # what Inductor's mode "lite" makes of layer norms in channels-last models is torch's own
        check_model(name, lowering)


def check_model(name: str, lowering: str) -> None:
    make, inputs, count, left = MODELS[name]
    torch.manual_seed(0)
    model = make()
    options = {"rank": 6, "density": 0.05, "seed": 1, "lowering": lowering}
    compiled = torch.compile(model, backend="sltrain", options=options)

    def output(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        result = run(**inputs)
        return getattr(result, "logits", result)

    output(compiled, inputs)
    factors = slcompile.factors(model)
    assert len(factors) == count
    report = slcompile.last_report()
    assert {each.reason for each in report.left} - {"no_matmul"} == set(left)
    for reason, owner in left.items():
        assert any(each.reason == reason and each.name == f"{owner}.weight" for each in report.left)
    randomize(model, 0.1)
    wide = composed_by_formula(copy.deepcopy(model).double())
    for each in (model, wide):  # batch norm's own noise is of no interest
        each.eval()
        for module in each.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    found, true = output(compiled, inputs), output(wide, {key: each.double() for key, each in inputs.items()})
    wave = torch.linspace(-1, 1, true.numel(), dtype=torch.float64).sin().view(true.shape)
    for loss in ((found * wave.float()).sum(), (true * wave).sum()):
        loss.backward()
    assert float((found - true).norm()) <= 1e-5 * float(true.norm())
    for (key, each), expected in zip(model.named_parameters(), wide.parameters(), strict=True):
        if expected.grad is not None:
            assert float((each.grad - expected.grad).norm()) <= 1e-4 * float(expected.grad.norm() + 1e-3), key
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """A convolution of each kind, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(8, 32, 3, padding=1, stride=2), nn.Conv2d(32, 24, 1, bias=False)
        self.head = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.point(torch.tanh(self.wide(x)))).mean((2, 3)))


IMAGES = torch.randn(3, 8, 7, 9, generator=torch.Generator().manual_seed(4))
SHAPES = {"wide.weight": (32, 8, 3, 3), "point.weight": (24, 32, 1, 1), "head.weight": (20, 24)}
STRUCTURES: dict[str, dict[str, Any]] = {
    "stratified": {"support": "stratified"},
    "vector": {"vector": 8},
    "uniform": {"support": "uniform"},
    "largest": {"support": "largest", "init": "spectral"},
    "frozen": {"base": "frozen"},
    "nf4": {"base": "nf4"},
    "block_low_rank": {"structure": "block_low_rank", "blocks": 4},
    "tensor_train": {"structure": "tensor_train"},
    "cp": {"structure": "cp", "blocks": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_sees_a_matrix_and_gives_back_the_kernel(structure: str) -> None:
    options = {**OPTIONS, **STRUCTURES[structure]}
    if "structure" in options:
        del options["density"]
    torch.manual_seed(0)
    model = Small()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    y = model(IMAGES)
    slcompile.factorize_(model, slcompile.SLConfig(**options))
    assert {
        name: tuple(each.shape) for name, each in slcompile.merged_state_dict(model).items() if name in SHAPES
    } == SHAPES
    if structure == "frozen":
        torch.testing.assert_close(model(IMAGES), y)
        assert torch.equal(model.wide.weight_sl.base, before["wide.weight"].flatten(1))
    randomize(model, 0.1)
    wide = composed_by_formula(copy.deepcopy(model).double())
    require_near(results(model, model, IMAGES)[:1], results(wide, wide, IMAGES.double())[:1])
    again = copy.deepcopy(model)
    fresh = Small()
    slcompile.factorize_(fresh, slcompile.SLConfig(**options))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(IMAGES), model(IMAGES))
    slcompile.merge_(model)
    assert {name: tuple(each.shape) for name, each in model.named_parameters() if name in SHAPES} == SHAPES
    torch.testing.assert_close(model(IMAGES), again(IMAGES), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(before)


def test_reset_and_spectral_start() -> None:
    torch.manual_seed(0)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    model.wide.reset_parameters()
    weight = model.wide.weight_sl
    assert not weight.B.any()
    assert 0.9 < float(weight.A.abs().max()) * 72**0.5 <= 1  # the fan-in is that of patches
    low = torch.randn(32, 4) @ torch.randn(4, 72)
    with torch.no_grad():
        other = Small()
        other.wide.weight.copy_(low.view(32, 8, 3, 3))
    slcompile.factorize_(other, slcompile.SLConfig(**OPTIONS, init="spectral"))
    torch.testing.assert_close(other.wide.weight.flatten(1), low, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_rewrite_inlines_leaf_modules_and_merges_back() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 24, 1),
        nn.Conv2d(24, 24, 3, groups=2),
    ]
    layers.append(nn.Conv2d(24, 32, (2, 3), padding="same", padding_mode="circular", dilation=2))
    model = nn.Sequential(*layers)
    gm = torch.fx.symbolic_trace(model)
    report = slcompile.rewrite(gm, CONFIG)
    assert [each.name for each in report.replaced] == ["0.weight", "1.weight", "3.weight"]
    assert [(each.name, each.reason) for each in report.left] == [("2.weight", "no_matmul")]
    randomize(gm, 0.2)
    y = model(IMAGES)  # its modules are the graph's
    torch.testing.assert_close(gm(IMAGES), y)
    slcompile.merge_(gm)
    torch.testing.assert_close(gm(IMAGES), y, rtol=1e-5, atol=1e-5)
    assert not [node for node in gm.graph.nodes if node.target == "view"]
    assert len(slcompile.rewrite(gm, CONFIG).replaced) == 3


def test_an_exported_program_is_rewritten() -> None:
    torch.manual_seed(0)
    model = Small()
    gm = torch.export.export(model, (IMAGES,)).module()
    assert {each.name for each in slcompile.rewrite(gm, CONFIG).replaced} == set(SHAPES)
    assert gm(IMAGES).shape == (3, 20)


@pytest.mark.slow
def test_explain_counts_patches_and_says_what_becomes_of_them() -> None:
    found = slcompile.explain(Small(), (IMAGES,), config=CONFIG)
    rows = {row.name: row for row in found.matmuls}
    assert {name: row.shape for name, row in rows.items()} == SHAPES
    assert {row.decision for row in rows.values()} == {"replaced"}
    assert (rows["wide.weight"].tokens, rows["point.weight"].tokens) == (3 * 4 * 5, 3 * 4 * 5)
    # The first one's input needs no gradient: 2 products of 3.
    dense = 2 * 3 * 4 * 5 * 32 * 72
    assert rows["wide.weight"].flops.before == 2 * dense
    assert rows["wide.weight"].flops.after == 2 * dense + (2 + 4) * 32 * 72 * 6
    assert rows["point.weight"].flops.before == 3 * 2 * 3 * 4 * 5 * 24 * 32
    factored = slcompile.explain(Small(), (IMAGES,), config=slcompile.SLConfig(**OPTIONS, lowering="factored"))
    lowerings = {row.name: row.lowering for row in factored.matmuls}
    assert lowerings == {"wide.weight": "", "point.weight": "factored", "head.weight": "factored"}
    assert "32x8x3x3" in str(found)


@pytest.mark.slow
def test_onnx_files_hold_the_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    randomize(model, 0.2)
    for compact in (False, True):
        report = slcompile.export_onnx(model, (IMAGES,), tmp_path / "model.onnx", compact=compact)
        assert set(report.merged if not compact else SHAPES) == set(SHAPES)
        assert report.max_abs < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["vector", "cp"])
def test_a_checkpoint_says_that_it_is_a_kernel(structure: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = resnet()
    options = {"rank": 6, "seed": 1, **STRUCTURES[structure]}
    slcompile.factorize_(model, slcompile.SLConfig(**options))
    randomize(model, 0.1).eval()
    slcompile.save_factorized(model, tmp_path / "factors")
    loaded = slcompile.load_factorized(tmp_path / "factors").eval()
    name = "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight_sl"
    assert loaded.get_submodule(name).stored_shape == model.get_submodule(name).stored_shape == (32, 32, 3, 3)
    torch.testing.assert_close(loaded(**PIXELS).logits, model(**PIXELS).logits)


@pytest.mark.slow
def test_memory_is_estimated() -> None:
    report = slcompile.estimate_memory(Small(), (IMAGES,), config=CONFIG)
    model = Small()
    slcompile.factorize_(model, CONFIG)
    assert report.sltrain.parameter_count == sum(each.numel() for each in model.parameters())
    assert report.sltrain.largest["parameters"] == sum(each.nbytes for each in model.parameters())


@pytest.mark.slow
def test_compress_fits_kernels_to_the_patches_that_they_read() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(8, 3)  # channels that follow from three
    batches = [torch.einsum("oi,bihw->bohw", mixing, torch.randn(4, 3, 7, 9)) for _ in range(3)]
    plain = slcompile.factorize_(copy.deepcopy(model := Small()), slcompile.SLConfig(**OPTIONS, init="spectral"))
    wanted = [model(batch) for batch in batches]
    config = slcompile.SLConfig(**{**OPTIONS, "support": "largest"})
    found = slcompile.compress(model, batches, rank=6, config=config)
    assert {name: each.shape for name, each in found.weights.items()} == SHAPES

    def error(of: nn.Module) -> float:
        return sum(float((of(batch) - y).square().sum()) for batch, y in zip(batches, wanted, strict=True))

    assert error(model) < error(plain) / 2
    # Every patch is of 3 channels' numbers, of which there are 27.
    assert found.weights["wide.weight"].error < 0.9
    budget = slcompile.compress(Small(), batches, budget=0.5, config=config)
    assert 0.4 < budget.share <= 0.5
    suggested = slcompile.suggest(Small(), 0.5, slcompile.SLConfig(**OPTIONS))
    assert {name: each.shape for name, each in suggested.weights.items()} == SHAPES


@pytest.mark.slow
@pytest.mark.parametrize("base", [None, "frozen"])
def test_a_channels_last_model_converts_and_merges(base: str | None) -> None:
    torch.manual_seed(0)
    model = Small().to(memory_format=torch.channels_last)
    dense = copy.deepcopy(model)
    x = IMAGES.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, **LITE, "base": base})
    found = results(model, compiled, x)[:2]
    require_near(found, by_formula(model, x)[:2])
    if base:
        torch.testing.assert_close(found[0], dense(x).detach())
        slcompile.merge_(model)
        for name, each in dense.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), each)


def test_transforms_and_shards_see_the_kernel(tmp_path: Path) -> None:
    model = factorized(Small)
    expected = results(model, model, IMAGES)
    parts = {name: each.detach() for name, each in model.named_parameters()}

    def loss(parts: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(model, parts, (IMAGES,))
        return (y * torch.linspace(-1, 1, y.numel()).sin().view(y.shape)).sum()

    for found, wanted in zip(torch.func.grad(loss)(parts).values(), expected[2:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with process_group(tmp_path):
        fully_shard(model)
        torch.testing.assert_close(model(IMAGES), expected[0])
        assert sum(each.numel() for each in model.parameters()) == sum(each.numel() for each in parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["auto", "factored"])
def test_batch_and_pictures_of_any_size(lowering: str) -> None:
    model = factorized(lambda: nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.Tanh(), nn.Conv2d(20, 24, 1)))
    compiled = torch.compile(model, backend="sltrain", dynamic=True, options={**OPTIONS, **LITE, "lowering": lowering})
    for size in ((2, 3, 5, 7), (3, 3, 8, 6)):
        x = torch.randn(size)
        require_near(results(model, compiled, x), by_formula(model, x))
