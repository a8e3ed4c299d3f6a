"""What several test files use: small models and operands, how they are compiled, what they save."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import slcompile
from slcompile import torch_private
from slcompile.captured import REQUIRED_SETTINGS
from slcompile.ops.support import groups_per_row, uniform_index
from slcompile.weight.structure import FactorizedWeight

EXAMPLES = Path(__file__).parents[1] / "examples"
OPTIONS: dict[str, Any] = {"rank": 8, "density": 0.05}
CONFIG = slcompile.SLConfig(**OPTIONS)
SPECTRAL = {**OPTIONS, "init": "spectral"}
SUPPORTS = ("stratified", "vector", "uniform")


def some_of(cases: Iterable[Any], first: Iterable[Any]) -> list[Any]:
    """The cases of a test in their order; those that are not among the first ones are run with the long tests."""
    cases, first = list(cases), list(first)
    assert all(each in cases for each in first), "a case that there is not"

    def param(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)

    return [case if case in first else param(case) for case in cases]


LITE = {"inductor": {**torch._inductor.list_mode_options()["lite"], **dict.fromkeys(REQUIRED_SETTINGS, True)}}
"""Options with which our passes run and Inductor calls ATen instead of compiling C++, which takes most time."""


class Model(nn.Module):
    """A linear layer, so that the input needs gradients and something converts; then a function of its result."""

    def __init__(self, function: Callable[..., object], members: dict[str, object]) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.function = function
        for name, member in members.items():
            if isinstance(member, tuple):
                self.register_parameter(name, nn.Parameter(torch.randn(member) / 8))
            else:
                setattr(self, name, member() if callable(member) else member)

    def forward(self, x: Tensor) -> object:
        return self.function(self, torch.tanh(self.first(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v))


def compiled_with(backend: object, model: nn.Module, **kwargs: object) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend, options=SPECTRAL, **kwargs)


def converted(model: nn.Module) -> set[str]:
    return set(slcompile.factors(model))


def saved_for_backward(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and every tensor that it keeps; what a compile on the way traces with fake tensors does not count."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), saved


def torchrun(*command: object, processes: int = 2) -> str:
    """Runs a script on several processes; returns what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_processes(script: Path, folder: Path, *functions: str, processes: int = 2) -> dict[str, list[Any]]:
    """What functions of a script return on each process, started once (``tests/stacks/ranks.py`` has what it runs)."""
    torchrun(script, folder, *functions, processes=processes)
    return {
        name: [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(processes)]
        for name in functions
    }


def randomize(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Gives every factor random values: B starts at zero, which would hide the low-rank part. A base stays."""
    with torch.no_grad():
        for weight in model.modules():
            if isinstance(weight, FactorizedWeight):
                for parameter in weight.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=std)
    return model


def drawn(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64, seed: int = 3) -> list[Tensor]:
    """Standard normal tensors, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(each), generator=generator, dtype=torch.float64).to(dtype) for each in shapes]


VECTOR = {"stratified": 1, "vector": 8, "uniform": 1}
"""Rows that share their columns, for each support."""


def support_of(kind: str, rows: int, columns: int, density: float, seed: int) -> tuple[Tensor, tuple[int, ...]]:
    """The last operand of an op, a seed or an index, and the shape of the values that lie there."""
    if kind != "uniform":
        return torch.tensor([seed]), (rows, groups_per_row(columns, density))
    index = uniform_index(seed, rows, columns, density)
    return index, tuple(index.shape)


def text_of(gm: fx.GraphModule) -> str:
    """A graph's text without numbers of users and types."""
    return re.sub(r" : .*?\] = ", " = ", str(gm.graph)).strip()


def example(name: str) -> ModuleType:
    """A program of examples/ as a module."""
    return sys.modules[name] if name in sys.modules else module_at(EXAMPLES / f"{name}.py", name)


def module_at(path: Path, name: str) -> ModuleType:
    """Runs a program of examples/ as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    sys.path.insert(0, str(EXAMPLES))  # one may use another
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def inductor_with_aten(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend: Inductor up to its graphs, which ATen executes."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    return compile_fx(gm, inputs, inner_compile=inner, config_patches=settings)


@contextlib.contextmanager
def aten_kernels() -> Iterator[None]:
    """Within, Inductor traces and partitions every graph, our joint passes run, and ATen executes what they leave: no
    code is generated, and a graph takes some tenths of a second instead of several. ``lower_ops`` is left out: what it
    makes lies transposed in memory, for which only generated code makes up.
    """
    before, torch_private.inductor = torch_private.inductor, inductor_with_aten
    try:
        yield
    finally:
        torch_private.inductor = before


@contextlib.contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """Within, this process is the only one of a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
