"""What lowerings take on a device: formulas, classes of devices, and the rates of this machine's devices."""

from __future__ import annotations

from slcompile.cost.devices import DEVICE_CLASSES, GPU_CLASSES, DeviceClass, aligned, device_class, why_no_kernels
from slcompile.cost.matmul import DTYPES, Matmul, Rates, crossover
from slcompile.cost.stored import default_rates, fingerprint, rates, store_rates, stored_rates

__all__ = [
    "DEVICE_CLASSES",
    "DTYPES",
    "GPU_CLASSES",
    "DeviceClass",
    "Matmul",
    "Rates",
    "aligned",
    "crossover",
    "default_rates",
    "device_class",
    "fingerprint",
    "rates",
    "store_rates",
    "stored_rates",
    "why_no_kernels",
]
