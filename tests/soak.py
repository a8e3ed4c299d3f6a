"""Thousands of steps with conversions, merges, recompiles and exports in one process: ``python -m tests.soak``.

Memory, open files, threads, our own caches, and what Dynamo keeps of code that it compiled are read after a tenth of
the steps, and must not have grown at the end. Data loaders fork and spawn beside the steps. Afterwards threads compile,
train and export models of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slcompile
from slcompile.convert.ledger import ledger
from slcompile.ops import sparse_cpu

OPTIONS: dict[str, Any] = {"rank": 8, "density": 0.05, "exclude": ()}
SUPPORTS = ("stratified", "vector", "uniform")
LIVES = 40
"""Models that one run makes one after another, each for its share of the steps."""

BYTES = 48 * 2**20
"""What an allocator may keep for itself between the first tenth of a run and its end."""


class Net(nn.Module):
    """64 -> 96 -> 64, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def readings() -> dict[str, int]:
    """Returns what must not grow."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    objects = gc.get_objects()
    return {
        "resident bytes": int(resident.split()[1]) * 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "factorized weights": sum(type(each) is slcompile.SLWeight for each in objects),
        "entries of the ledger": sum(len(each) for each in vars(ledger).values() if hasattr(each, "__len__")),
        "bytes kept of supports": sparse_cpu.kept_bytes(),
        "entries of Dynamo's cache": len(torch._dynamo.eval_frame._debug_get_cache_entry_list(Net.forward.__code__)),
        "graphs": sum(issubclass(type(each), torch.fx.GraphModule) for each in objects),
    }


def live(number: int, steps: int, folder: Path) -> None:
    """One model's life: it is made, trained while compiled, merged, trained again, exported, and dropped."""
    torch.manual_seed(number)
    torch._dynamo.reset()  # as notebooks and sweeps do between models: else a limit of recompiles is reached
    model = Net()
    support = SUPPORTS[number % len(SUPPORTS)]
    if number % 4 == 0:
        slcompile.factorize_(model, slcompile.SLConfig(support=support, **OPTIONS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "support": support})
    batches = batches_for_ever(number)
    losses = []
    for step in range(steps):
        # Another number of tokens in the second third: Dynamo compiles again, for any number.
        x = next(batches) if step % 16 == 0 else torch.randn((16, 24)[step * 3 // steps % 2], 64)
        loss = (compiled(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == steps // 2:  # the next step converts again
            slcompile.merge_(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert bool(torch.tensor(losses).isfinite().all()), losses[-3:]
    assert set(slcompile.factors(model)) == {"up.weight", "down.weight"}
    report = slcompile.export_onnx(model, (x,), folder / "model.onnx", verify=False)
    (found,) = onnxruntime.InferenceSession(report.path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-4)


def batches_for_ever(number: int) -> Iterator[Tensor]:
    """Yields batches; for every eighth model from a process that is forked, and for the next from a spawned one."""
    workers: dict[str, Any] = {}
    if number % 8 in (1, 2):
        workers = {"num_workers": 1, "multiprocessing_context": ("fork", "spawn")[number % 8 - 1]}
    loader = DataLoader(TensorDataset(torch.randn(512, 64)), batch_size=16, **workers)
    while True:
        for (batch,) in loader:
            yield batch


def soak(steps: int, say: Callable[[str], None], numbers: Sequence[int] = range(LIVES)) -> list[dict[str, int]]:
    """Runs so many steps in all; returns the readings after each fourth model, since four follow another way each."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for position, number in enumerate(numbers):
            live(number, steps // len(numbers), Path(folder))
            if number % 4 == 3:
                found.append(readings())
                say(f"{(position + 1) * (steps // len(numbers))} steps: {json.dumps(found[-1])}")
    return found


def grown(first: dict[str, int], last: dict[str, int]) -> list[str]:
    """Says what grew: memory by more than an allocator keeps, anything else at all."""
    slack = {"resident bytes": BYTES}
    more = [name for name in first if last[name] > first[name] + slack.get(name, 0)]
    return [f"{name}: {first[name]:,} -> {last[name]:,}" for name in more]


def in_threads(count: int, steps: int) -> None:
    """Several threads compile, train and export models of their own at once.

    Raises:
        Exception: The first one that a thread met.
    """
    errors: list[BaseException] = []

    steps_of_all = threading.Barrier(count)

    def work(number: int, folder: Path) -> None:
        try:
            train_and_export(number, steps, folder, steps_of_all)
        except BaseException as error:
            errors.append(error)
            steps_of_all.abort()

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=work, args=(number, Path(folder))) for number in range(count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise errors[0]
        assert len(list(Path(folder).glob("*.onnx"))) == count


def train_and_export(number: int, steps: int, folder: Path, of_all: threading.Barrier) -> None:
    """What one thread does with a model of its own class and width."""

    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    width = 48 + 16 * number
    model = Own(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))
    compiled = torch.compile(model, backend="sltrain", options=OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(number))
    of_all.wait()
    losses = []
    for _ in range(steps):
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    assert set(slcompile.factors(model)) == {"0.weight", "2.weight"}
    of_all.wait()  # while one thread exports, torch takes the compiled calls of every other for traced ones, and raises
    slcompile.export_onnx(model, (x,), folder / f"{number}.onnx", verify=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {text}", flush=True)

    first, *_, last = soak(args.steps, say)
    more = grown(first, last)
    for name in first:
        print(f"| {name} | {first[name]:,} | {last[name]:,} |")
    print(f"grew: {', '.join(more) or 'nothing'}", flush=True)
    in_threads(args.threads, 20)
    say(f"{args.threads} threads compiled, trained and exported")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
