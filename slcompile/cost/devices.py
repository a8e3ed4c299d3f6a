"""What is assumed of classes of devices."""

from __future__ import annotations

import torch

from slcompile import torch_private
from slcompile.cost.matmul import Rates


def cpu_rates(threads: int) -> Rates:
    # Of one thread of a server core with AVX-512; what counts is how the rates compare with each other.
    bfloat16 = 700e9 if torch_private.has_amx() else 180e9
    matmul = {"float64": 40e9, "float32": 85e9, "float16": 1e9, "bfloat16": bfloat16}
    sparse = {"float64": 5e9, "float32": 22e9, "float16": 30e9, "bfloat16": 30e9}
    matmul, sparse = ({name: rate * threads for name, rate in each.items()} for each in (matmul, sparse))
    return Rates(matmul, sparse, memory=6e9 * threads, entries=60e6 * threads, index_bytes=4, transposes=1)


# Dense rates are 0.7 of the data sheets', bandwidths 0.85; float32 without TF32. Sparse rates are estimates: they were
# not measured.
GPUS = {
    "sm_90": Rates(
        {"float64": 40e12, "float32": 45e12, "float16": 690e12, "bfloat16": 690e12},
        {"float64": 0.5e12, "float32": 1e12, "float16": 1e12, "bfloat16": 1e12},
        memory=2.8e12,
    ),
    "sm_80": Rates(
        {"float64": 13e12, "float32": 14e12, "float16": 220e12, "bfloat16": 220e12},
        {"float64": 0.3e12, "float32": 0.6e12, "float16": 0.6e12, "bfloat16": 0.6e12},
        memory=1.7e12,
    ),
    "gfx942": Rates(
        {"float64": 80e12, "float32": 110e12, "float16": 900e12, "bfloat16": 900e12},
        {"float64": 0.5e12, "float32": 1e12, "float16": 1e12, "bfloat16": 1e12},
        memory=4.5e12,
    ),
}


def device_class(device: torch.device) -> str:
    """``"cpu"``, or the class of GPUs whose kernel configurations and rates fit best; sm_80 where there is no GPU.

    Models on the meta device are taken for ones on this machine's accelerator, on its CPU where it has none.
    """
    if device.type == "cpu" or (device.type == "meta" and not torch.accelerator.is_available()):
        return "cpu"
    device = torch.device("cuda") if device.type == "meta" else device
    if torch.version.hip:
        return "gfx942"
    has_gpu = torch.cuda.is_available()
    return "sm_90" if has_gpu and torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"
