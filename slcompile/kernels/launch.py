"""How a kernel is launched: with which tiles, on which device, so that torch.compile can trace it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import Autotuner, JITFunction

from slcompile.cost.devices import Tile, gpu_class


def dot_precision() -> str:
    """Returns the precision of float32 dots that torch's own matmuls have."""
    # It says what the older setting says too; reading that one raises where this one was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the arguments are on: makes theirs the current one."""
    if tensor.device.type not in ("cuda", "xpu"):  # interpreted, or only traced
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


def launchable(kernel: Any) -> Any:
    """Returns a kernel that make_fx can trace.

    ``torch.library.wrap_triton``, which in torch 2.11 raises on the kernels of Triton's interpreter, alone or inside
    an autotuner; these are returned as they are.
    """
    inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
    return torch.library.wrap_triton(kernel) if isinstance(inner, JITFunction) else kernel


@dataclass(frozen=True, eq=False)
class Tiled:
    """A kernel whose tiles the table of device classes holds.

    Attributes:
        kernel: A ``triton.jit`` function.
        name: Of its tiles in the table.
        tried: What autotuning tries of each size.
        key: The parameters whose change makes it try again.
    """

    kernel: Any
    name: str
    tried: Mapping[str, Sequence[int]]
    key: Sequence[str]

    @functools.cached_property
    def tuner(self) -> Any:
        """The kernel as one that tries several tiles."""
        tiles: list[dict[str, int]] = [{}]
        for size, choices in self.tried.items():
            tiles = [{**tile, size: choice} for tile in tiles for choice in choices]
        configs = [triton.Config(tile, num_warps=4, num_stages=4) for tile in tiles]
        return triton.autotune(configs, key=list(self.key), cache_results=True)(self.kernel)

    def to_launch(self, x: Tensor, autotune: bool) -> tuple[Any, Tile]:
        """Returns what to launch for this input, and its tile; autotuning adds the tile itself."""
        if autotune:
            return launchable(self.tuner), {}
        found = gpu_class(x.device)
        return launchable(self.kernel), (found.tiles_32 if x.dtype == torch.float32 else found.tiles)[self.name]
