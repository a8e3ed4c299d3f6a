"""Feeds what reads files with mutated ones: it loads, or raises one clear error, and nothing is left half done.

Each batch runs in a fork of its own, so that a crash is seen as one. A file that takes longer than ``PATIENCE`` or more
memory than twice its size and ``SLACK`` is a defect, too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import slcompile
from slcompile.cli.sources import sl_config
from slcompile.inspect.onnx_graph import onnx_diff
from tests.fuzz.mutate import NAMES, ODD, of_bytes, of_json, of_safetensors
from tests.testing import SUPPORTS, randomize

PATIENCE = 20
"""Seconds; what is loaded here takes a few hundredths of one."""
SLACK = 48 * 2**20
"""Bytes that an allocator may take for whatever reason; lengths that are made up run to gigabytes."""
CONFIG = {"rank": 8, "density": 0.05, "alpha": 12}


class Corpus:
    """Healthy files, in a directory that goes with this process."""

    def __init__(self) -> None:
        from tests.export.test_checkpoint import papers
        from tests.zoo import tiny

        torch.manual_seed(0)
        self.directory = tempfile.TemporaryDirectory()
        self.root = root = Path(self.directory.name)
        self.checkpoints: list[Path] = []
        for kind, support in (("llama", "stratified"), ("gpt2", "vector"), ("llama", "uniform")):
            model = slcompile.factorize_(tiny(kind), slcompile.SLConfig(support=support, **CONFIG))
            self.checkpoints.append(slcompile.save_factorized(randomize(model), root / f"{kind}-{support}"))
        for file in ("pytorch_model.bin", "model.safetensors"):
            directory = root / f"paper-{file.split('.')[1]}"
            directory.mkdir()
            papers(directory, torch.float32, None, file)
            self.checkpoints.append(directory)
        self.onnx: list[Path] = []
        x = torch.randn(4, 64)
        for name, options in (("a", {}), ("b", {"compact": True})):
            model = slcompile.factorize_(network(), slcompile.SLConfig(**CONFIG))
            self.onnx.append(slcompile.export_onnx(model, x, root / f"{name}.onnx", verify=False, **options).path)


@functools.cache
def healthy() -> Corpus:
    """Returns this process's corpus."""
    return Corpus()


def network() -> nn.Module:
    """A small model."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 64))


def load_a_checkpoint(corpus: Corpus, random: Random) -> None:
    """``load_factorized`` of a directory in which one file was mutated."""
    source = random.choice(corpus.checkpoints)
    with tempfile.TemporaryDirectory(dir=corpus.root) as scratch:
        directory = Path(scratch, "model")
        shutil.copytree(source, directory)
        file = random.choice(sorted(directory.iterdir()))
        if file.suffix == ".json":
            file.write_text(of_json(file.read_text(), random), errors="surrogateescape")
        elif file.suffix == ".safetensors":
            file.write_bytes(of_safetensors(file.read_bytes(), random))
        else:
            file.write_bytes(of_bytes(file.read_bytes(), random))
        with clear_error(ValueError, limit=2 * sum(each.stat().st_size for each in directory.iterdir())) as error:
            model = slcompile.load_factorized(directory)
        if error:
            return
        for weight in slcompile.merged_state_dict(model).values():  # composes: positions are inside, sizes fit
            assert isinstance(weight, Tensor)


def load_a_state(corpus: Corpus, random: Random) -> None:
    """``load_state_dict`` of a state dict with an entry that does not belong there."""
    support = random.choice(SUPPORTS)
    model, other = (factorized(support, seed) for seed in (0, 1))
    state: dict[Any, Any] = dict(other.state_dict())
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(list(state))
        state[name] = changed(state[name], random)
        if random.random() < 0.2:
            state[f"{name}{random.choice(NAMES)}"] = state.pop(name)
        elif random.random() < 0.1:
            del state[name]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    strict = random.random() < 0.7
    size = sum(each.numel() * each.element_size() for each in state.values() if isinstance(each, Tensor))
    with clear_error(RuntimeError, limit=2 * size) as error:
        model.load_state_dict(state, strict=strict)
    if error:
        after = model.state_dict()
        changed_ = [name for name, each in before.items() if not torch.equal(each, after[name])]
        assert not changed_, f"a refused state dict changed {changed_}: {error[0]}"
    else:
        with torch.no_grad():
            model(torch.randn(3, 64))


def factorized(support: str, seed: int) -> nn.Module:
    """The small model with random factors."""
    torch.manual_seed(seed)
    config = slcompile.SLConfig(support=support, **CONFIG, seed=seed)
    return randomize(slcompile.factorize_(network(), config))


def changed(value: Any, random: Random) -> Any:
    """Returns something else for an entry of a state dict."""
    if not isinstance(value, Tensor):
        return value
    if random.random() < 0.15:
        return random.choice((*ODD, [value], *([] if value.is_meta else [value.numpy()])))
    kinds: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda each: each.t() if each.dim() == 2 else each[:-1],
        lambda each: each[None],
        lambda each: each[:0],
        lambda each: each.flatten(),
        lambda each: each.double(),
        lambda each: each.to(torch.int8),
        lambda each: each.float() + 0.5,
        lambda each: each.to(torch.complex64),
        lambda each: each.bool(),
        lambda each: each.to("meta"),
        lambda each: each + 10**9 if not each.is_floating_point() else each * float("nan"),
        lambda each: -each,
        lambda each: each.flip(0) if each.dim() else each,
        lambda each: torch.zeros_like(each),
        lambda each: each.expand(3, *each.shape),
        lambda each: each.to_sparse(),
    )
    return random.choice(kinds)(value)


def diff_onnx(corpus: Corpus, random: Random) -> None:
    """``slcompile diff`` of two ONNX files, one of them mutated."""
    other = random.choice(corpus.onnx)
    with tempfile.TemporaryDirectory(dir=corpus.root) as scratch:
        file = Path(scratch, "mutated.onnx")
        content = of_bytes(random.choice(corpus.onnx).read_bytes(), random)
        file.write_bytes(content)
        with clear_error(ValueError, limit=2 * len(content)) as error:
            found = onnx_diff(*((other, file) if random.random() < 0.5 else (file, other)))
        if not error:
            str(found)
            found.to_html(Path(scratch, "page.html"))
            found.to_json(Path(scratch, "diff.json"))


def read_a_config(corpus: Corpus, random: Random) -> None:
    """Options as torch.compile gets them and as the command line does, with one or two that are odd."""
    fields = asdict(slcompile.SLConfig())
    settings: dict[str, Any] = {name: value for name, value in fields.items() if random.random() < 0.3}
    for _ in range(random.choice((1, 2))):
        name = random.choice([*fields, *NAMES, "inductor"])
        settings[name] = random.choice((*ODD, object(), {"a"}, ["ok", 3], b"x", 1j))
    if random.random() < 0.5:
        with clear_error(ValueError):
            slcompile.SLConfig.from_options(settings)
    else:
        with clear_error(ValueError):
            sl_config([f"{name}={value!r}" for name, value in settings.items()])


TARGETS = ((load_a_checkpoint, 4), (load_a_state, 3), (diff_onnx, 2), (read_a_config, 1))


@contextlib.contextmanager
def clear_error(kind: type[Exception], limit: int | None = None) -> Iterator[list[Exception]]:
    """Takes an error of this kind that says something, and yields a list that then holds it; measures memory.

    Raises:
        AssertionError: The error says nothing or a book, or more memory than ``limit`` bytes and ``SLACK`` was taken.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = memory("VmRSS")
    found: list[Exception] = []
    try:
        yield found
    except kind as error:
        found.append(error)
    for each in found:
        assert str(each).strip(), f"{type(each).__name__} without a word"
        assert len(str(each)) < 4000, f"a message of {len(str(each))} characters: {str(each)[:200]}"
    taken = memory("VmHWM") - before
    assert limit is None or taken <= limit + SLACK, f"{taken:,} bytes taken, {limit:,} are twice the file"


def memory(name: str) -> int:
    """Returns bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def example(number: int, corpus: Corpus) -> str:
    """Runs one example; returns its target's name.

    Raises:
        Exception: Whatever is no clear error, with the target's name in a note.
    """
    random = Random(number)
    target = random.choices([each for each, _ in TARGETS], [weight for _, weight in TARGETS])[0]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        target(corpus, random)
    return target.__name__


def batch(first: int, counts: dict[str, Any], size: int = 50) -> None:
    """Runs so many mutated files from a number on in a fork, and counts them by what reads them."""
    corpus = healthy()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        log.touch()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _child(first, size, corpus, log)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        numbers = {each["number"] for each in lines if "what" in each}
        begun = [each["number"] for each in lines if "what" not in each]
        done = size
        if status or len(numbers) < size:
            last = begun[-1] if begun else first
            counts["wrong"].append({"number": last, "error": f"the process ended with status {status}"})
            done = last + 1 - first
        for each in lines:
            if "what" in each:
                counts[each["what"]] = counts.get(each["what"], 0) + 1
                counts["wrong"] += [each] if "error" in each else []
    counts["examples"] += done
    if done < size:  # those after a crash
        batch(first + done, counts, size - done)


class TookTooLong(BaseException):
    """No Exception: nobody is to make a clear error of it."""


def _child(first: int, size: int, corpus: Corpus, log: Path) -> None:
    warnings.simplefilter("ignore")

    def give_up(*_: Any) -> None:
        raise TookTooLong(f"more than {PATIENCE} seconds")

    signal.signal(signal.SIGALRM, give_up)
    most = memory("VmSize") + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # a made-up length must not take the machine
    with log.open("a") as file:
        for number in range(first, first + size):
            print(json.dumps({"number": number}), file=file, flush=True)
            signal.alarm(PATIENCE)
            line: dict[str, Any] = {"number": number}
            try:
                line["what"] = example(number, corpus)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)
                names = {one.__name__ for one, _ in TARGETS}
                line["what"] = next((each.name for each in where if each.name in names), "no target")
                frame = [f"{Path(each.filename).name}:{each.lineno}" for each in where][-4:]
                line["error"] = f"{type(error).__name__}: {error}"[:300] + f" at {' '.join(frame)}"
            finally:
                signal.alarm(0)
            print(json.dumps(line), file=file, flush=True)
