"""A matrix that stays is held in 8 or in 4 bits a number; each 64 neighbours of a row share a scale, their largest.

``"int8"`` rounds ``127 * w / scale``. ``"nf4"`` takes the nearest of 16 levels to ``w / scale``, the quantiles of a
normal distribution (QLoRA, arXiv 2305.14314, appendix E). A packed row holds the codes, of nf4 two in a byte and the
first one in its upper half, and then the scales in float32: so it is one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
BITS = {"int8": 8, "nf4": 4}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape of what ``quantize`` makes of a matrix, or a stack of them: [..., bytes of a row]."""
    blocks = -(-shape[-1] // BLOCK)
    return (*shape[:-1], blocks * (BLOCK * BITS[kind] // 8 + 4))


def quantize(weight: Tensor, kind: str) -> Tensor:
    """Packs a matrix, or a stack of them.

    Args:
        weight: [..., K], floating-point and finite, as conversions ask of weights.
        kind: ``"int8"`` or ``"nf4"``.

    Returns:
        uint8 of shape ``packed_shape``.
    """
    blocks = torch.nn.functional.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1)
    relative = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    if kind == "int8":
        codes = (relative * 127).round().to(torch.int8).view(torch.uint8).flatten(-2)
    else:
        levels = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
        nearest = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten(-2)
        codes = nearest[..., ::2] << 4 | nearest[..., 1::2]
    return torch.cat([codes, scale.view(torch.uint8)], -1)


def dequantize_reference(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Computes ``dequantize`` in ops that exporters know."""
    codes, scale = _parts(packed, columns)
    blocks = scale.shape[-2]
    if codes.shape[-1] == blocks * BLOCK:
        relative = codes.contiguous().view(torch.int8).float() / 127
    else:
        assert codes.shape[-1] == blocks * BLOCK // 2, (packed.shape, columns)
        levels = torch.tensor(NF4, dtype=torch.float32, device=packed.device)
        relative = levels[torch.stack([codes >> 4, codes & 15], -1).flatten(-2).int()]
    return (relative.unflatten(-1, (blocks, BLOCK)) * scale).flatten(-2)[..., :columns].to(dtype)


def _parts(packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Returns codes and scales, [..., blocks, 1]."""
    blocks = -(-columns // BLOCK)
    codes, scale = packed.split([packed.shape[-1] - 4 * blocks, 4 * blocks], -1)
    return codes, scale.contiguous().view(torch.float32).unsqueeze(-1)


@torch.library.custom_op("slcompile::dequantize", mutates_args=())
def dequantize(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Unpacks what ``quantize`` made.

    Args:
        packed: [..., bytes of a row], uint8.
        columns: K.
        dtype: Of the result.

    Returns:
        [..., K], contiguous.
    """
    codes, scale = _parts(packed, columns)
    blocks = scale.shape[-2]
    # In place, and two numbers at once by the byte that holds both: several float32 matrices would be made otherwise.
    if codes.shape[-1] == blocks * BLOCK:
        relative = codes.contiguous().view(torch.int8).float().div_(127)
    else:
        levels = torch.tensor(NF4, dtype=torch.float32, device=packed.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)
        relative = pairs.index_select(0, codes.flatten().int()).view(*codes.shape[:-1], blocks * BLOCK)
    relative.unflatten(-1, (blocks, BLOCK)).mul_(scale)
    return relative[..., :columns].to(dtype).contiguous()


@dequantize.register_fake
def _(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], columns), dtype=dtype)


def as_base(base: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a base in a dtype, unpacked where it is packed."""
    return base.to(dtype) if base.is_floating_point() else dequantize(base, columns, dtype)
