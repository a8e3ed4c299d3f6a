"""Whole models with convolutions: they train, merge, shard and are rewritten."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import slcompile
from slcompile.health import composed_by_formula
from tests.convolutions.models import (
    CONFIG,
    IMAGES,
    OPTIONS,
    PIXELS,
    SHAPES,
    Small,
    Unet,
    by_formula,
    convnext,
    factorized,
    require_near,
    resnet,
    results,
)
from tests.testing import LITE, aten_kernels, process_group, randomize, some_of

NOISY = {"x": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), "steps": torch.tensor([3.0, 40.0])}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int, dict[str, str]]] = {
    # The patches are excluded by their name, "embeddings"; the classifier has 10 rows.
    "resnet": (resnet, PIXELS, 5, {"excluded": "resnet.embedder.embedder.convolution", "too_small": "classifier.1"}),
    "convnext": (convnext, PIXELS, 5, {"excluded": "convnext.embeddings.patch_embeddings", "too_small": "classifier"}),
    "unet": (Unet, NOISY, 10, {"too_small": "leave"}),
}
ONCE = [("resnet", "composed"), ("unet", "factored")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lowering"), some_of(itertools.product(MODELS, ("composed", "factored")), ONCE))
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
