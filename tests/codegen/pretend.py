"""A GPU that is not there: what torch, Inductor and Triton ask of one is answered, nothing runs on it.

The answers are of an H100. Tried with torch 2.13.0 (CPU build) and Triton 3.7.1, and 2.11.0 (CUDA build) and 3.6.0.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

DEVICE = torch.device("cuda", 0)

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85 * 10**9,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
)

ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "is_initialized": lambda: False,
    "_lazy_init": lambda: None,
    "synchronize": lambda device=None: None,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "is_tf32_supported": lambda: True,
    "set_device": lambda device: None,
    "memory_allocated": lambda device=None: 0,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
}


class Driver:
    """What torch and Triton ask of Triton's driver."""

    class utils:
        @staticmethod
        def get_device_properties(index: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
                    "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}  # fmt: skip

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            return 0, 0, 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, index: int) -> None:
        pass

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def is_active(self) -> bool:
        return True

    def get_benchmarker(self) -> Callable[..., float]:
        return lambda run, **kwargs: run() or 1.0


class AnyDevice:
    """In the place of context managers that make a device the current one."""

    def __init__(self, *args: Any) -> None:
        pass

    def __enter__(self) -> AnyDevice:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


# Indexing and ``contiguous`` make the tensor's device the current one, for which a CPU build has no code.
plain_getitem, plain_contiguous = Tensor.__getitem__, Tensor.contiguous


def getitem(self: Tensor, index: Any) -> Tensor:
    indices = index if isinstance(index, tuple) else (index,)
    if self.device.type != "cuda" or not all(isinstance(each, slice) for each in indices):
        return plain_getitem(self, index)
    for axis, each in enumerate(indices):
        self = torch.ops.aten.slice(self, axis, each.start, each.stop, 1 if each.step is None else each.step)
    return self


def contiguous(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if self.device.type != "cuda":
        return plain_contiguous(self, memory_format=memory_format)
    return self if self.is_contiguous() else torch.ops.aten.clone(self, memory_format=memory_format)


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Within it, torch and Triton believe that there is an H100."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, answer in ANSWERS.items():
            patch(torch.cuda, name, answer)
            if hasattr(CudaInterface, name):
                patch(CudaInterface, name, staticmethod(answer))
        for name in ("get_device_properties", "current_device"):
            patch(CudaInterface.Worker, name, staticmethod(ANSWERS[name]))
        patch(CudaInterface, "get_raw_stream", staticmethod(lambda index: 0))
        for owner, name in ((torch.cuda, "device"), (torch.cuda, "device_of"), (CudaInterface, "device")):
            patch(owner, name, AnyDevice)
        patch(Tensor, "__getitem__", getitem)
        patch(Tensor, "contiguous", contiguous)
        patch(triton.runtime.driver, "_active", Driver())
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
        # A CPU build has no such function; CUDA graphs ask it (torch 2.13).
        stack.enter_context(
            mock.patch.object(torch._C, "_cuda_cudaCachingAllocator_is_enabled", create=True, return_value=True)
        )
        if torch.version.cuda is None:
            patch(torch.version, "cuda", "13.0")
        # They remember what they answered before.
        for name in ("has_triton", "triton_backend", "triton_hash_with_backend", "_device_supports_tma"):
            function = getattr(_triton, name, None)
            if hasattr(function, "cache_clear"):
                function.cache_clear()
                stack.callback(function.cache_clear)
        yield


@contextlib.contextmanager
def templates_win() -> Iterator[None]:
    """Within it, max-autotune times nothing, and finds Inductor's own matmuls faster than the vendor's."""
    from torch._inductor.codecache import PersistentCache
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def lookup(self: Any, choices: list[Any], *args: Any, **kwargs: Any) -> dict[Any, float]:
        return {each: 1.0 if "Extern" in type(each).__name__ else 0.5 for each in choices}

    def nothing(self: Any, *args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: None

    with (
        mock.patch.object(PersistentCache, "lookup", lookup),
        mock.patch.object(AlgorithmSelectorCache, "make_precompile_fn", nothing),
        mock.patch("torch._inductor.config.benchmark_epilogue_fusion", False),
    ):
        yield
