"""Estimated times of generated code on an H100: from the shapes of what it calls, at the rates of ``slcompile.cost``.

Nothing was measured. A product takes its FLOPs at the rate of the vendor's matmuls, or its bytes at the bandwidth; with
a short sum or few results it reaches the share that ``Rates.narrow`` says, and with an operand whose rows and columns
both begin anywhere, half of it. The vector support's products reach the share ``Rates.own``, and what they gather comes
at ``Rates.gathers``. Other kernels take their bytes at the bandwidth. Each call takes a launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from slcompile.cost import DEVICE_CLASSES, Rates
from slcompile.cost.matmul import vector_block
from tests.codegen.launches import Call

(H100,) = (each for each in DEVICE_CLASSES if each.name == "sm_90")
MULTIPROCESSORS = 132
UNALIGNED = 0.5
COMPARED = 25e-9
"""Seconds in which ``vector_order_kernel`` compares a block's column with all others'."""


@dataclass(frozen=True)
class Size:
    """A model of the paper.

    Attributes:
        hidden, inner, layers, rank, density: Of its layers.
        vocabulary: Of its embedding and its head, which stay dense.
    """

    hidden: int
    inner: int
    layers: int
    rank: int
    density: float
    vocabulary: int = 32000


SIZES = {
    "1B": Size(2048, 5461, 24, 512, 0.03),
    "1B at 5504": Size(2048, 5504, 24, 512, 0.03),
    "7B": Size(4096, 11008, 32, 1024, 0.05),
}


def is_unaligned(tensor: Tensor) -> bool:
    """Whether neither its rows nor its columns begin at multiples of 16 bytes."""
    return max(tensor.stride()) * tensor.itemsize % 16 != 0


def product_operands(call: Call) -> list[Tensor]:
    """Both operands of a product of the vendor's and its result; nothing for other calls."""
    return list(call.arguments.values())[-3:] if call.name.startswith("extern_kernels") else []


def seconds(call: Call, rates: Rates = H100.rates) -> float:
    """Estimated seconds of a call."""
    if operands := product_operands(call):
        first, second, result = operands
        m, n, k = *result.shape[-2:], first.shape[-1]
        tiles = math.prod(result.shape[:-2]) * math.ceil(m / 128) * math.ceil(n / 256)
        share = rates.narrow if k <= 1024 or tiles < MULTIPROCESSORS else 1.0
        share *= UNALIGNED if is_unaligned(first) or is_unaligned(second) else 1.0
        name = str(first.dtype).removeprefix("torch.")
        return max(_flops(call) / (share * rates.matmul[name]), _bytes(call) / rates.memory) + rates.launch
    if call.name in ("add_kernel", "read_kernel"):
        sectors = 2 if call.name == "add_kernel" else 1
        moved = call.arguments["size"] * (sectors * rates.sector + call.arguments["p_values"].itemsize)
        return moved / rates.memory + rates.launch
    if call.name == "linear_factored_transposed_kernel":
        dense = 2 * call.arguments["tokens"] * call.arguments["rows"] * call.arguments["columns_0"]
        return dense / (rates.tiled * rates.matmul["bfloat16"]) + _bytes(call) / rates.memory + rates.launch
    if call.name == "vector_product_kernel":
        multiplied = _flops(call) * _multiplied(call) / rates.own / rates.matmul["bfloat16"]
        return max(multiplied, _bytes(call) / rates.memory) + rates.launch
    if call.name == "vector_product_transposed_kernel":
        z = call.arguments["p_z"]
        return _flops(call) / rates.own / rates.matmul["bfloat16"] + _size(z) / rates.memory + rates.launch
    if call.name == "vector_values_kernel":
        gathered = call.arguments["p_columns"].numel() * call.arguments["tokens"] * call.arguments["p_right"].itemsize
        return gathered / rates.gathers + _bytes(call) / rates.memory + rates.launch
    if call.name == "vector_order_kernel":
        return len(call.arguments["p_columns"]) * COMPARED + rates.launch
    return _bytes(call) / rates.memory + rates.launch


def roofline(call: Call) -> float:
    """The least seconds that the vendor's figures allow."""
    flops, bandwidth = H100.peak
    return max(_flops(call) / flops, _bytes(call) / bandwidth)


def _multiplied(call: Call) -> float:
    """How often more a program multiplies than there is: what one block's columns give, for all rows that it has."""
    a = call.arguments
    vector = len(a["p_values"]) // a["blocks"]
    return (a["ranks"] + a["groups"] * max(1, vector_block(vector) // vector)) / (a["ranks"] + a["groups"])


def _flops(call: Call) -> float:
    a = call.arguments
    if call.name == "vector_product_kernel":
        return 2.0 * a["tokens"] * a["rows"] * (a["ranks"] + a["groups"])
    if call.name == "vector_product_transposed_kernel":
        return 2.0 * a["tokens"] * a["columns"] * a["ranks"]
    operands = product_operands(call)
    return 2.0 * operands[2].numel() * operands[0].shape[-1] if operands else 0.0


def _bytes(call: Call) -> float:
    if call.name in ("add_kernel", "read_kernel"):  # of the matrix, the entries alone
        values, matrix = call.arguments["p_values"], call.arguments["p_matrix"]
        return values.numel() * (values.itemsize + matrix.itemsize * (2 if call.name == "add_kernel" else 1))
    tensors = product_operands(call) or [*call.read, *call.written]
    return float(sum(map(_size, tensors)))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def step(size: Size, tokens: int, layer: Sequence[Call], trained: int) -> float:
    """Estimated seconds of a training step.

    Args:
        size: The model.
        tokens: Of the step.
        layer: What a layer calls, forward and backward.
        trained: Its parameters.
    """
    rates = H100.rates
    head = 6 * tokens * size.vocabulary * size.hidden / rates.matmul["bfloat16"]
    loss = 3 * tokens * size.vocabulary * 2 * 2 / rates.memory
    # Attention at short sequences: q, k, v, its result and their gradients, forward and backward.
    attention = size.layers * 12 * tokens * size.hidden * 2 / rates.memory
    # A fused AdamW reads and writes a parameter and both moments, and reads its gradient.
    optimizer = (size.layers * trained + 2 * size.vocabulary * size.hidden) * 14 / rates.memory
    return size.layers * sum(map(seconds, layer)) + head + loss + attention + optimizer
