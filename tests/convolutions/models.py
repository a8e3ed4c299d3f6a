"""Models with convolutions, and what their weights as matrices [out, in * kernel] compute by the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slcompile
from slcompile.health import composed_by_formula
from tests.testing import randomize

OPTIONS: dict[str, Any] = {"rank": 6, "density": 0.05, "seed": 1, "min_dim": 16}
CONFIG = slcompile.SLConfig(**OPTIONS)


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
