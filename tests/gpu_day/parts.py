"""The parts of the day, in order: what each measures, and how long it may take."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slcompile import cost
from slcompile.measure import _copy_rate, _fastest, _product_rate, measure_rates
from tests.codegen.estimate import SIZES, Size
from tests.gpu_day.kernels import kernel_rows
from tests.gpu_day.steps import decode, train
from tests.testing import LITE

ROOT = Path(__file__).parents[2]
LAYERS = {"1B": 4, "1B at 5504": 4, "7B": 2}
TOKENS = (16384, 4096, 65536)
KERNEL_TOKENS = 8192
GPU_TESTS = (
    "test_entries",
    "test_weight_grads",
    "test_support",
    "test_compose",
    "test_linear_factored",
    "test_vector_products",
)


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Attributes:
        name: Under which its result is kept.
        seconds: It is expected to take so long; it is begun only where so much time is left, and ended after
            three times that.
        run: Returns what JSON holds.
    """

    name: str
    seconds: int
    run: Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """How large the day is.

    Attributes:
        device: A GPU; the CPU for a rehearsal.
        sizes: Models, and how many of their layers.
        tokens: Of the train steps.
        kernel_tokens: Of the dense products beside the kernels.
        few: Tokens that are decoded.
        spend: Seconds on each kernel.
        runs: Timed runs of each step.
        workers: Processes in which tests run.
        inductor: Inductor's own settings.
    """

    device: torch.device
    sizes: dict[str, Size] = dataclasses.field(default_factory=lambda: dict(SIZES))
    tokens: tuple[int, ...] = TOKENS
    kernel_tokens: int = KERNEL_TOKENS
    few: tuple[int, ...] = (1, 16)
    dtype: torch.dtype = torch.bfloat16
    spend: float = 0.05
    runs: int = 9
    rate_seconds: float = 0.3
    workers: int = min(12, os.cpu_count() or 1)
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def tiny(device: torch.device) -> Plan:
        """Returns a rehearsal's plan, of some seconds."""
        small = {"tiny": Size(64, 97, 1, 8, 0.05, 64)}
        return Plan(
            device,
            small,
            (32,),
            32,
            (1,),
            torch.float32,
            spend=0.001,
            runs=3,
            rate_seconds=0.001,
            workers=1,
            inductor=LITE["inductor"],
        )

    def parts(self) -> list[Part]:
        """Returns the parts, the most telling ones first."""
        device, names = self.device, list(self.sizes)
        found = [
            Part("machine", 15, partial(machine, device, self.spend)),
            Part("tests of compiled models", 150, partial(outcomes, ["tests/gpu_day/test_compiled.py"], self.workers)),
        ]
        found += [Part(f"kernels {name}", 60, partial(self._kernels, name)) for name in names]
        found.append(Part("rates", 20, partial(rates, device, self.rate_seconds)))
        steps = [
            Part(f"train {name}, {count} tokens", 140, partial(self._train, name, count))
            for count in self.tokens
            for name in names
        ]
        decodes = [Part(f"decode {name}", 60, partial(self._decode, name)) for name in names]
        tested = [
            Part(f"tests of {each}", 120, partial(outcomes, [f"tests/kernels/{each}.py"], self.workers))
            for each in GPU_TESTS
        ]
        return [*found, *steps[: len(names)], *decodes, *tested[:1], *steps[len(names) :], *tested[1:]]

    def _layers(self, name: str) -> int:
        return LAYERS.get(name, 1)

    def _kernels(self, name: str) -> Any:
        size = self.sizes[name]
        shapes = ((size.hidden, size.hidden), (size.inner, size.hidden), (size.hidden, size.inner))
        return {
            f"{rows}x{columns}": kernel_rows(self.device, size, (rows, columns), self.kernel_tokens, self.spend)
            for rows, columns in shapes
        }

    def _train(self, name: str, tokens: int) -> Any:
        return train(self.device, self.sizes[name], self._layers(name), tokens, self.dtype, self.runs, self.inductor)

    def _decode(self, name: str) -> Any:
        return decode(
            self.device, self.sizes[name], self._layers(name), self.few, self.dtype, 3 * self.runs, self.inductor
        )


def machine(device: torch.device, spend: float) -> dict[str, Any]:
    """What the numbers were measured on, and what it reaches beside what the cost model assumes."""
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "platform": platform.platform(terse=True),
        "device": str(device),
        "class": cost.device_class(device).name,
    }
    timed = partial(_fastest, device=device, seconds=spend)
    sizes = (8192, 8192, 8192) if device.type != "cpu" else (256, 256, 256)
    found["bfloat16 matmul, TFLOP/s"] = _product_rate(device, torch.bfloat16, sizes, timed) / 1e12
    found["copy, TB/s"] = _copy_rate(device, 2**28 if device.type != "cpu" else 2**20, timed) / 1e12
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"memory, GB": properties.total_memory / 1e9, "CUDA": torch.version.cuda}
    return found


def outcomes(paths: list[str], workers: int) -> dict[str, Any]:
    """Runs the tests that are marked ``gpu``; returns how many passed, failed and were skipped, and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += ["-n", str(workers)] if workers > 1 else []
        done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {}
    for each in cases:
        for kind in ("failure", "error"):
            if (found := each.find(kind)) is not None:
                bad[f"{each.get('classname')}::{each.get('name')}"] = (found.get("message") or "")[:300]
    skipped = sum(each.find("skipped") is not None for each in cases)
    counts = {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
    return {**counts, "failures": dict(list(bad.items())[:40])}


def rates(device: torch.device, seconds: float) -> dict[str, Any]:
    """Measures the cost model's rates, as ``slcompile rates --measure`` does, and returns them beside the defaults."""
    before = dataclasses.asdict(cost.default_rates(device))
    measured, path = measure_rates(device, seconds)
    found = {"measured": dataclasses.asdict(measured), "default": before, "file": path.name}
    return json.loads(json.dumps(found, default=str).replace("Infinity", "null"))
