"""What is assumed of devices: one table, a row for each class of them. Torch only, so that it needs no Triton.

To add a class, write a row and put it into ``DEVICE_CLASSES`` before the rows whose devices it takes; rates, the
roofline, the kernels' tiles and all that is compiled for it, in tests too, follow from the row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from slcompile import torch_private
from slcompile.cost.matmul import Rates

Tile = Mapping[str, int]
"""A kernel's constants and options: sizes of blocks, ``num_warps``, ``num_stages``."""

TILES_32: Mapping[str, Tile] = {
    "project": {"BLOCK_R": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    "linear_factored": {"BLOCK_N": 16, "BLOCK_R": 32, "GATHER": 4096, "num_warps": 8, "num_stages": 3},
    "linear_factored_transposed": {"BLOCK_K": 32, "BLOCK_R": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
"""For float32 operands on any device: without matrix instructions the same tile takes several times the registers."""


@dataclass(frozen=True)
class DeviceClass:
    """A class of devices.

    Attributes:
        name: Its name in messages, reports and files.
        matches: Whether a device is one of the class. It is asked for devices that no earlier row takes.
        rates: What its devices reach, by default; with ``per_thread``, one thread of them.
        peak: FLOP/s of dense bfloat16 matmuls and bytes/s, as the vendor states them; for rooflines.
        target: What Triton compiles for: backend, architecture and threads of a warp. None where no kernel runs: ATen
            takes their place.
        shared: Bytes of shared memory that a program may have.
        tiles: Name of a kernel -> its tile for 16-bit operands.
        tiles_32: The same for float32.
        per_thread: Whether the rates grow with the number of threads.
        factored_tokens: Most tokens that the factored matmul's kernels are for; None where they are for any number.
            They read hidden matrices and write partial sums again and again, gigabytes of them for a training batch.
    """

    name: str
    matches: Callable[[torch.device], bool]
    rates: Rates
    peak: tuple[float, float] = (0.0, 0.0)
    target: tuple[str, int | str, int] | None = None
    shared: int = 0
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    tiles_32: Mapping[str, Tile] = field(default_factory=lambda: TILES_32)
    per_thread: bool = False
    factored_tokens: int | None = None


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _is_hip(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def _has_capability(device: torch.device, *major: int) -> bool:
    available = device.type == "cuda" and torch.cuda.is_available()
    return available and torch.cuda.get_device_capability(device)[0] in major


def _by_dtype(float64: float, float32: float, float16: float, bfloat16: float | None = None) -> dict[str, float]:
    half = float16 if bfloat16 is None else bfloat16
    return {"float64": float64, "float32": float32, "float16": float16, "bfloat16": half}


# Of one thread of a server core with AVX-512; what counts is how the rates compare with each other.
_CPU_SPARSE = _by_dtype(5e9, 22e9, 30e9)
_CPU = Rates(
    _by_dtype(40e9, 85e9, 1e9, 180e9),
    _CPU_SPARSE,
    memory=6e9,
    entries=60e6,
    index_bytes=4,
    transposes=1,
    vector=_by_dtype(15e9, 35e9, 10e9, 35e9),
)
_CPU_AMX = dataclasses.replace(_CPU, matmul=_by_dtype(40e9, 85e9, 1e9, 700e9), vector=_by_dtype(15e9, 35e9, 10e9, 90e9))

# What counts for these kernels is how many bytes are under way: many small programs, each with several tiles of its
# factor in flight, whose rows are 128 bytes. Of the tiles that were tried, these need no spilled registers at any of
# the paper's shapes.
_SM_90_TILES: Mapping[str, Tile] = {
    "project": {"BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6},
    "linear_factored": {"BLOCK_N": 16, "BLOCK_R": 64, "GATHER": 8192, "num_warps": 4, "num_stages": 6},
    "linear_factored_transposed": {"BLOCK_K": 32, "BLOCK_R": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
}


def _gpu(matmul: dict[str, float], sparse: float, memory: float) -> Rates:
    # Gathers of 128 bytes from the L2 cache; in float64 nothing is factored.
    by_dtype = _by_dtype(sparse, sparse, sparse)
    return Rates(matmul, by_dtype, memory, narrow=0.7, launch=1.5e-6, sector=32, tiled=0.15)


# Rates of GPUs are estimates, none was measured: dense ones 0.7 of the data sheets', bandwidths 0.85, float32 without
# TF32.
DEVICE_CLASSES = (
    DeviceClass("cpu_amx", lambda device: _is_cpu(device) and torch_private.has_amx(), _CPU_AMX, per_thread=True),
    DeviceClass("cpu", _is_cpu, _CPU, per_thread=True),
    DeviceClass(
        "gfx942",  # AMD MI300X
        _is_hip,
        _gpu(_by_dtype(80e12, 110e12, 900e12), sparse=4e12, memory=4.5e12),
        peak=(1307e12, 5.30e12),
        factored_tokens=256,
        target=("hip", "gfx942", 64),
        shared=64 * 1024,
        tiles={
            "project": {"BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            "linear_factored": {"BLOCK_N": 16, "BLOCK_R": 64, "GATHER": 8192, "num_warps": 4, "num_stages": 2},
            "linear_factored_transposed": {
                "BLOCK_K": 32, "BLOCK_R": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2,
            },
        },
    ),
    DeviceClass(
        "sm_100",  # NVIDIA B200
        lambda device: _has_capability(device, 10, 11),
        _gpu(_by_dtype(28e12, 52e12, 1570e12), sparse=6e12, memory=6.8e12),
        peak=(2250e12, 8.0e12),
        factored_tokens=256,
        target=("cuda", 100, 32),
        shared=227 * 1024,
        tiles=_SM_90_TILES,
        tiles_32={
            **TILES_32,
            "linear_factored": {"BLOCK_N": 16, "BLOCK_R": 32, "GATHER": 2048, "num_warps": 4, "num_stages": 3},
        },
    ),
    DeviceClass(
        "sm_90",  # NVIDIA H100 SXM
        lambda device: _has_capability(device, 9),
        _gpu(_by_dtype(40e12, 45e12, 690e12), sparse=4e12, memory=2.8e12),
        peak=(989e12, 3.35e12),
        factored_tokens=256,
        target=("cuda", 90, 32),
        shared=227 * 1024,
        tiles=_SM_90_TILES,
    ),
    DeviceClass(
        "sm_80",  # NVIDIA A100 SXM 80 GB; also what is assumed of GPUs without a row, and where there is no GPU
        lambda device: device.type in ("cuda", "xpu"),
        _gpu(_by_dtype(13e12, 14e12, 220e12), sparse=2e12, memory=1.7e12),
        peak=(312e12, 2.04e12),
        factored_tokens=256,
        target=("cuda", 80, 32),
        shared=99 * 1024,  # of compute capability 8.6, 8.9 and 12.0; an A100 has 163
        tiles={
            **_SM_90_TILES,
            "project": {"BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 6},
            "linear_factored_transposed": {
                "BLOCK_K": 32, "BLOCK_R": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3,
            },
        },
    ),
    # Apple's GPUs and whatever else there is; like an M2 Max.
    DeviceClass("other", lambda device: True, Rates(_by_dtype(1e12, 9e12, 9e12), _by_dtype(1e11, 1e11, 1e11), 3e11)),
)  # fmt: skip
"""The classes; a device is of the first one that matches."""

GPU_CLASSES = tuple(each for each in DEVICE_CLASSES if each.target is not None)
"""Those that kernels are compiled for."""


def device_class(device: torch.device) -> DeviceClass:
    """Returns the class of a device.

    Models on the meta device are taken for ones on this machine's accelerator, on its CPU where it has none.
    """
    if device.type == "meta":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return next(each for each in DEVICE_CLASSES if each.matches(device))


def gpu_class(device: torch.device) -> DeviceClass:
    """Returns the class whose tiles a kernel takes: the device's, or sm_80 where it is interpreted."""
    found = device_class(device)
    return found if found.target is not None else GPU_CLASSES[-1]


def why_no_kernels(device: torch.device) -> str:
    """Says why ATen computes on a device what Triton's kernels compute on others; empty where they run."""
    found = device_class(device)
    if found.per_thread:
        return "CPUs run ATen"
    if found.target is None:
        return f"no kernel runs on {device.type}, but ATen does"
    if not has_triton() and torch.accelerator.is_available():  # else the device is one that need not be there
        return "Triton is not installed"
    return ""


@functools.cache
def has_triton() -> bool:
    """Returns whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def aligned(elements: int, dtype: torch.dtype) -> int:
    """Returns the elements of a row with which rows begin at multiples of 16 bytes, as the vendors' fast matmuls need.

    Those that there are if they do; otherwise enough more for 128 bytes, a line of the cache.
    """
    if elements * dtype.itemsize % 16 == 0:
        return elements
    line = 128 // dtype.itemsize
    return elements + -elements % line
