"""What several test files use: small models, how they are compiled, what they save."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import slcompile
from slcompile.captured import REQUIRED_SETTINGS

OPTIONS = {"rank": 8, "density": 0.05, "init": "spectral"}
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
    return torch.compile(model, backend=backend, options=OPTIONS, **kwargs)


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
