"""Vision and diffusion transformers as other libraries write them, by hand: fused projections, scales, modulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slcompile

WIDTH, HEADS, SIDE, PATCH, CLASSES = 64, 4, 16, 4, 40
CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Fused queries, keys and values; norms of queries and keys; by its formula or by torch's function."""

    def __init__(self, fused: bool, normed: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        norm = nn.LayerNorm if normed else nn.Identity
        self.q_norm, self.k_norm = norm(WIDTH // HEADS), norm(WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, WIDTH))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = 128) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Gated(nn.Module):
    """A gated unit whose two halves are one matrix, with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(WIDTH, 2 * 96), nn.LayerNorm(96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.silu(gate) * x))


class Patches(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, WIDTH, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Class and register tokens, scales of layers, a head of the class token or of the mean."""

    def __init__(self, fused: bool = True, gated: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.patches, self.tokens = Patches(), nn.Parameter(torch.randn(1, 3, WIDTH) / 8)
        self.positions = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH) / 8)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.mlp = Attention(fused, normed=gated), Gated() if gated else Mlp()
        self.scales = nn.ParameterList(torch.full((WIDTH,), 0.1) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels) + self.positions
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.scales[0] * self.attention(self.norms[0](x))
        x = x + self.scales[1] * self.mlp(self.norms[1](x))
        x = self.norm(x)
        return {"logits": self.head(x[:, 3:].mean(dim=1) if self.pooled else x[:, 0])}


class Mixer(nn.Module):
    """One of its two products mixes tokens: its input is transposed."""

    def __init__(self) -> None:
        super().__init__()
        tokens = (SIDE // PATCH) ** 2 * 4
        self.patches = nn.Conv2d(3, WIDTH, PATCH // 2, PATCH // 2)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.tokens, self.channels, self.head = Mlp(tokens, 32), Mlp(), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return {"logits": self.head(self.norms[2](x).mean(dim=1))}


class CrossCovariance(nn.Module):
    """Attention between channels, and a class token that alone asks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = Patches(), nn.Parameter(torch.randn(1, 1, WIDTH) / 8)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1) @ v
        x = x + self.proj(mixed.permute(0, 3, 1, 2).flatten(-2))
        x = self.norms[1](torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1))
        return {"logits": self.head(attend(self.q(x[:, :1]), self.k(x), self.v(x))[:, 0])}


def sinusoids(steps: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, device=steps.device) / (WIDTH // 2))
    angles = steps[:, None] * frequencies.to(steps.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Conditioned(nn.Module):
    """Embeds the step of a diffusion and a class, from which every block's shifts, scales and gates come."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.classes = nn.Embedding(10, WIDTH)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))

    def forward(self, steps: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        condition = self.step(sinusoids(steps)) + self.classes(classes)
        return self.modulation(condition).unsqueeze(1).chunk(self.modulation[1].out_features // WIDTH, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift


class Diffusion(nn.Module):
    """A diffusion transformer: what its norms do depends on the step; it gives an image back."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.condition = Patches(4), Conditioned(8)
        self.attention, self.mlp = Attention(fused=True), Mlp()
        self.last = nn.Linear(WIDTH, PATCH * PATCH * 4)

    def forward(self, pixels: Tensor, steps: Tensor, classes: Tensor) -> dict[str, Tensor]:
        parts = self.condition(steps, classes)
        x = self.patches(pixels)
        x = x + parts[2] * self.attention(modulated(x, parts[0], parts[1]))
        x = x + parts[5] * self.mlp(modulated(x, parts[3], parts[4]))
        x = self.last(modulated(x, parts[6], parts[7]))
        side = SIDE // PATCH
        x = x.reshape(x.shape[0], side, side, PATCH, PATCH, 4)
        return {"noise": torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, SIDE, SIDE)}


class JointDiffusion(nn.Module):
    """Image and text each with weights of its own, in one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.condition = Patches(4), Conditioned(6)
        self.words = nn.Linear(48, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, PATCH * PATCH * 4)

    def forward(self, pixels: Tensor, steps: Tensor, classes: Tensor, text: Tensor) -> dict[str, Tensor]:
        parts = self.condition(steps, classes)
        image, words = self.patches(pixels), self.words(text)
        streams = modulated(image, *parts[:2]), modulated(words, *parts[2:4])
        packed = torch.cat([qkv(x) for qkv, x in zip(self.qkv, streams, strict=True)], dim=1)
        joint = attend(*packed.chunk(3, dim=-1)).split([image.shape[1], words.shape[1]], dim=1)
        image = image + parts[4] * self.proj[0](joint[0])
        words = words + parts[5] * self.proj[1](joint[1])
        return {"noise": self.last(F.layer_norm(image, (WIDTH,))), "words": words}


def images(channels: int = 3) -> dict[str, Any]:
    return {"pixels": torch.randn(2, channels, SIDE, SIDE)}


def diffusion() -> dict[str, Any]:
    return {**images(4), "steps": torch.tensor([3.0, 700.0]), "classes": torch.tensor([1, 7])}


@dataclass(frozen=True)
class Handmade:
    """A model of this file.

    Attributes:
        family: vision or diffusion.
        build: Makes it.
        given: What it is called with.
    """

    family: str
    build: Callable[[], nn.Module]
    given: Callable[[], dict[str, Any]]
    options: slcompile.SLConfig = CONFIG
    exports: bool = True

    def make(self) -> nn.Module:
        """The model in training mode."""
        return self.build().train()

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """What it is called with."""
        return self.given()


HANDMADE = {
    "timm_vit": Handmade("vision", VisionTransformer, images),
    "timm_vit_unfused": Handmade("vision", lambda: VisionTransformer(fused=False, pooled=True), images),
    "timm_eva": Handmade("vision", lambda: VisionTransformer(gated=True), images),
    "timm_mixer": Handmade("vision", Mixer, images),
    "timm_xcit": Handmade("vision", CrossCovariance, images),
    "dit": Handmade("diffusion", Diffusion, diffusion),
    "mmdit": Handmade("diffusion", JointDiffusion, lambda: {**diffusion(), "text": torch.randn(2, 5, 48)}),
}
