"""What a kernel is built for and from: device classes, launching, and compiling without a GPU to read what it takes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import Autotuner, JITFunction

from slcompile import cost

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""One target a device class."""

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have."""

_POINTEES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
_MMA = re.compile(r"\b(mma\.sync|wgmma\.mma_async|v_mfma)")


class Resources(NamedTuple):
    """What one program of a compiled kernel takes."""

    registers: int
    """Of a thread: 32 bits each."""
    spilled: int
    """Bytes of a thread's registers that went to memory."""
    shared: int
    """Bytes of shared memory of a program."""
    has_mma: bool
    """Whether there are matrix instructions in it."""


def device_class(device: torch.device) -> str:
    """The key of ``TARGETS`` whose configuration fits a device best; "sm_80" where there is no GPU."""
    kind = cost.device_class(device)
    return "sm_80" if kind == "cpu" else kind


def dot_precision() -> str:
    """Of float32 dots: what torch's own matmuls do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the arguments are on: makes theirs the current one."""
    # Without a GPU a launch is interpreted, or only traced.
    return torch.cuda.device_of(tensor) if torch.cuda.is_available() else contextlib.nullcontext()


def launchable(kernel: Any) -> Any:
    """A kernel that make_fx can trace.

    ``torch.library.wrap_triton``, which in torch 2.11 raises on the kernels of Triton's interpreter, alone or inside
    an autotuner; these are returned as they are.
    """
    inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
    return torch.library.wrap_triton(kernel) if isinstance(inner, JITFunction) else kernel


def signature_of(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature and constants with which ``kernel`` is compiled when it is launched with these arguments.

    Tensors may be of any device, "meta" too: they count as aligned to 16 bytes, as torch allocates them. Integers
    that are 1 or divisible by 16 are specialised, as Triton does it.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_POINTEES[value.dtype]}:16"
        elif isinstance(value, int):
            signature[parameter.name] = ("i32" if -(2**31) <= value < 2**31 else "i64") + ":16" * (value % 16 == 0)
        else:
            signature[parameter.name] = "fp32"
    return signature, constants


def compile_for(
    kernel: JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> CompiledKernel:
    """Compiles a kernel for a device that need not be there.

    Args:
        kernel: A ``triton.jit`` function.
        signature: Type of each parameter, such as "*bf16", "i32" or "constexpr". With ":16" after it, the address or
            integer is divisible by 16, which is what loads of several elements at a time need.
        constants: Value of each "constexpr".
        target: A key of ``TARGETS``.
        num_warps: Warps of a program.
        num_stages: Depth of its software pipeline.
    """
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages})


def resources(compiled: CompiledKernel) -> Resources:
    """Reads what ``compile_for`` made, with the cuobjdump that comes with Triton for CUDA."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {name: int(value) for name, value in re.findall(r"\.(\w+_count): *(\d+)", text)}
        spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
        return Resources(found["vgpr_count"], spilled, compiled.metadata.shared, bool(_MMA.search(text)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    has_mma = bool(_MMA.search(compiled.asm["ptx"]))
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, has_mma)
