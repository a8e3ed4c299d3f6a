"""What optimizers keep and allocate, in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes; step counters, 4 bytes a tensor, are left out.

    Attributes:
        state: Bytes kept for a parameter, by its number of elements and its bytes an element.
        scratch: Bytes that its step allocates for one parameter, likewise.
        together: Whether one step holds what it allocates for all parameters at once (``foreach``).
        scratch_cpu: As ``scratch``, on the CPU, where that is another implementation.
    """

    state: Callable[[int, int], int]
    scratch: Callable[[int, int], int]
    together: bool = False
    scratch_cpu: Callable[[int, int], int] | None = None

    def scratch_on(self, device: str) -> Callable[[int, int], int]:
        """Returns ``scratch`` on a device."""
        return self.scratch_cpu if device == "cpu" and self.scratch_cpu is not None else self.scratch


def _copies(number: int) -> Callable[[int, int], int]:
    return lambda count, itemsize: number * count * itemsize


def _blockwise(count: int, itemsize: int) -> int:
    # bitsandbytes: two moments, a byte each and a float32 scale for every 256; small tensors stay float32.
    return 8 * count if count < 4096 else 2 * count + 8 * math.ceil(count / 256)


def _four_bits(count: int, itemsize: int) -> int:
    # torchao: two moments, half a byte each and a float32 scale for every 128, and two tables of 16 float32; tensors
    # that are small, or whose size blocks do not divide, stay in the parameter's dtype.
    return 2 * itemsize * count if count < 4096 or count % 128 else count + 8 * (count // 128) + 128


OPTIMIZERS = {
    "adamw": Optimizer(_copies(2), _copies(0)),
    "adamw-foreach": Optimizer(_copies(2), _copies(1), together=True),
    # On the CPU bitsandbytes unpacks the moments and a block's scales to five float32 tensors.
    "adamw8bit": Optimizer(_blockwise, _copies(0), scratch_cpu=lambda count, itemsize: 20 * count),
    "adamw4bit": Optimizer(_four_bits, _copies(0)),
    "sgd": Optimizer(_copies(0), _copies(0)),
    "sgd-momentum": Optimizer(_copies(1), _copies(0)),
}
"""``adamw``: torch's with ``fused=True``; ``adamw-foreach``: torch's default on GPUs; ``adamw8bit``: bitsandbytes';
``adamw4bit``: torchao's, which Inductor compiles to kernels that unpack, update and pack, and which is taken to
allocate nothing of a parameter's size."""
