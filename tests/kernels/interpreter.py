"""What the scripts among these tests run in: Triton's interpreter, made to compute as GPUs do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from tests.kernels.harness import name_of

Case = TypeVar("Case", bound=tuple[Any, ...])


def save_results(make: Callable[[], dict[str, Any]]) -> None:
    """Writes what ``make`` returns to the file that the command line names; see the fixture ``interpreted``."""
    repair_interpreter()
    # torch.empty returns NaN, so that an element which is never written shows.
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    torch.save(make(), sys.argv[1])


def asked(cases: Iterable[Case]) -> dict[str, Case]:
    """The cases that the command line names after the file, or all if it names none, by their names."""
    return {name: case for case in cases if (name := name_of(case)) in sys.argv[2:] or not sys.argv[2:]}


def repair_interpreter() -> None:
    """Gives the interpreter bfloat16 as GPUs have it: by itself it multiplies the bit patterns, as if they were
    integers, in tl.dot, and truncates where a GPU rounds to nearest. And triton 3.6 takes an int from an array of one
    dimension for the bounds of loops, which numpy 2.4 refuses."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        wide = [self.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b)]
        return dot(self, *wide, *rest)

    def cast_impl(self, source, kind):
        if (source.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(source.data.copy()).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, kind)

    def patch_tensor(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    patch = interpreter._patch_lang_tensor
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_tensor
