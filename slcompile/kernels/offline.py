"""Compiles kernels for GPUs that need not be there, and reads what they take."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from slcompile.cost.devices import GPU_CLASSES

TARGETS = {each.name: GPUTarget(*each.target) for each in GPU_CLASSES if each.target is not None}
"""One target a device class."""

_POINTEES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
_MMA = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")


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


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any
    arguments: dict[str, Any]
    """By the name of the parameter."""
    options: dict[str, int]
    """``num_warps`` and ``num_stages``."""


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Within it, launches are written to the list instead of done, with the tiles of a device class.

    Tensors may be on the meta device.
    """
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
                every = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **constants}
                found.append(Launch(self.kernel, every, {"num_warps": num_warps, "num_stages": num_stages}))

            return record

    (found_class,) = (each for each in GPU_CLASSES if each.name == target)
    with (
        mock.patch("torch.library.wrap_triton", Recorder),
        mock.patch("slcompile.kernels.launch.gpu_class", return_value=found_class),
    ):
        yield found


def signature_of(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the signature and constants with which ``kernel`` is compiled when it is launched with these arguments.

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
            # Inductor passes a Python float so; Triton itself would say fp32.
            signature[parameter.name] = "fp64"
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


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """Compiles the kernel of a launch as it was launched."""
    signature, constants = signature_of(launch.kernel, launch.arguments)
    options: dict[str, Any] = dict(launch.options)
    return compile_for(launch.kernel, signature, constants, target, **options)


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
