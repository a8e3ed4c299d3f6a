"""What a long, a parallel, a repeated and a misused run must not do: grow, race, differ, or fail without a name."""

from __future__ import annotations

import gc
import importlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries

import slcompile
from slcompile.config import SKIPPABLE
from tests.testing import randomize

few = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
no_number = st.one_of(st.none(), st.booleans(), st.text(), st.lists(st.integers()), st.just(float("nan")), st.binary())
no_int = st.one_of(no_number, st.floats())
positive = {"min_value": 0, "exclude_min": True}

VALID = {
    "rank": st.one_of(st.integers(1, 24), st.floats(0.05, 0.3)),
    "density": st.floats(0.001, 0.3),
    "alpha": st.one_of(st.integers(1, 64), st.floats(0.1, 100)),
    "support": st.sampled_from(("stratified", "vector", "uniform")),
    "init": st.sampled_from(("auto", "kaiming", "spectral")),
    "seed": st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    "include": st.sampled_from(("*", ["up*", "mix"], ("*.weight",))),
    "exclude": st.sampled_from(((), "head*", ["down.weight"])),
    "min_dim": st.integers(1, 60),
    "lowering": st.sampled_from(("auto", "composed", "factored")),
    "keep_weights": st.booleans(),
    "memory_budget": st.sampled_from((None, 1, "20kB", "1GiB")),
    "autotune": st.booleans(),
    "structure": st.just("sparse_low_rank"),
    "skip_passes": st.lists(st.sampled_from(SKIPPABLE)),
    "inductor": st.sampled_from(({}, {"max-autotune": False}, {"epilogue_fusion": True})),
}
not_bool = st.one_of(st.none(), st.integers(), st.floats(), st.text())
INVALID = {
    "rank": st.one_of(no_number, st.integers(max_value=0), st.floats(max_value=0), st.floats(min_value=1)),
    "density": st.one_of(no_number, st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.integers(2)),
    "alpha": st.one_of(no_number, st.floats(max_value=0), st.integers(max_value=0), st.just(float("inf"))),
    "support": st.one_of(not_bool, st.booleans()),
    "init": st.one_of(not_bool, st.booleans()),
    "seed": st.one_of(no_int.filter(lambda each: each is not None), st.integers(max_value=-1), st.integers(2**63)),
    "include": st.one_of(
        st.none(), st.integers(), st.just(""), st.lists(st.one_of(st.none(), st.just("")), min_size=1)
    ),
    "exclude": st.one_of(
        st.none(), st.integers(), st.just(""), st.lists(st.one_of(st.none(), st.just("")), min_size=1)
    ),
    "min_dim": st.one_of(no_int, st.integers(max_value=0)),
    "lowering": st.one_of(not_bool, st.booleans()),
    "keep_weights": not_bool,
    "save": st.one_of(not_bool, st.booleans()),
    "memory_budget": st.one_of(st.booleans(), st.integers(max_value=0), st.just("6XB"), st.lists(st.integers())),
    "autotune": not_bool,
    "dryrun": not_bool,
    "structure": st.one_of(not_bool, st.booleans()),
    "skip_passes": st.one_of(not_bool, st.lists(not_bool, min_size=1)),
    "inductor": st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()), st.just({"no_such": 1})),
}
wrong = st.sampled_from(sorted(INVALID)).flatmap(lambda name: st.tuples(st.just(name), INVALID[name]))


@pytest.mark.slow
@settings(max_examples=6, **few)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_valid_options_train(block_class, aten_kernels, options):
    torch._dynamo.reset()
    model = block_class()
    compiled = torch.compile(model, backend="sltrain", options=options)
    x = torch.randn(8, 64)
    compiled(x).square().sum().backward()
    assert slcompile.factors(model)
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, each in model.named_parameters():
        assert (gradients[name] - each.grad).norm() <= 2**-16 * each.grad.norm(), name


@pytest.mark.slow
@settings(max_examples=300, **few)
@given(wrong, st.fixed_dictionaries({}, optional=VALID))
def test_an_invalid_option_among_valid_ones_is_named(wrong, options):
    name, value = wrong
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(ValueError, match=name):
        slcompile.backend.sltrain(graph, [torch.ones(1)], options={**options, name: value})


@settings(max_examples=50, **few)
@given(st.text(min_size=1).filter(lambda name: name not in INVALID), st.fixed_dictionaries({}, optional=VALID))
def test_an_unknown_option_is_named(name, options):
    with pytest.raises(ValueError, match=re.escape(f"unknown option {name!r}")):
        slcompile.SLConfig.from_options({**options, name: 1})


@pytest.mark.slow
def test_two_threads_that_compile_at_once_disturb_nothing(block_class, batch, aten_kernels, assert_eager):
    """Each thread with a model of its own: while one traces, the other converts."""
    models = [block_class() for _ in range(4)]
    barrier, errors = threading.Barrier(len(models)), []

    def train(model: nn.Module, lowering: str) -> None:
        try:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            options = {"rank": 8, "density": 0.05, "lowering": lowering}
            compiled = torch.compile(model, backend="sltrain", options=options)
            barrier.wait()
            losses = []
            for _ in range(6):
                losses.append(F.cross_entropy(compiled(batch[0]), batch[1]))
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            assert losses[-1] < losses[0]
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=train, args=(model, ("composed", "factored")[index % 2]))
        for index, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for model in models:
        assert set(slcompile.factors(model)) == {"up.weight", "down.weight", "mix"}
        assert_eager(torch.compile(model, backend="sltrain"), model, (batch[0],))


@pytest.mark.parametrize(
    "options",
    [{}, {"base": "frozen"}, {"base": "nf4", "density": 0}, {"structure": "cp", "base": "frozen"}],
    ids=["no base", "frozen", "nf4", "cp"],
)
def test_replicas_of_data_parallel_compute_the_same(monkeypatch, options):
    """On the CPU, for which torch has no broadcast."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors, devices, detach=False):
        return [[each.detach() if detach else each.view_as(each) for each in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    randomize(slcompile.factorize_(model, slcompile.SLConfig(rank=8, **options)))
    x, found = torch.randn(6, 64), []
    for models in ([model], replicate.replicate(model, [0, 1])):
        model.zero_grad()
        y = torch.cat([each(part) for each, part in zip(models, x.chunk(len(models)), strict=True)])
        y.square().sum().backward()
        found.append([y, *(each.grad for each in model.parameters() if each.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux's /proc")
def test_a_thousand_steps_grow_nothing(block, batch, counting):
    compiled = torch.compile(block, backend=counting, options={"rank": 8, "density": 0.05})
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)

    def step() -> None:
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def sizes() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), len(cache_entries(type(block).forward.__code__))

    for _ in range(100):
        step()
    objects, entries = sizes()
    memory = resident_bytes()
    for _ in range(1000):
        step()
    # A leak of one float tensor a step would be a thousand objects; of a batch, 8 MB.
    grown = resident_bytes() - memory
    now, entries_now = sizes()
    assert now - objects < 100  # fewer, where other tests left garbage behind
    assert entries_now == entries
    assert entries <= counting.calls == 2
    assert grown < 2**21, f"{grown:,} bytes"


DETERMINISTIC = """
import hashlib, sys, torch, slcompile
torch.use_deterministic_algorithms(True)
torch.set_num_threads(2)
for lowering, support in (("composed", "stratified"), ("factored", "uniform")):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.Dropout(0.1))
    options = {"rank": 8, "density": 0.05, "lowering": lowering, "support": support}
    compiled = torch.compile(model, backend="sltrain", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        ids = torch.randint(0, 50, (8, 16))
        loss = (compiled(ids) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(slcompile.factors(model)) == 1
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    print(lowering, digest.hexdigest())
"""


@pytest.mark.long
def test_deterministic_algorithms_train_bit_equal_in_every_process(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DETERMINISTIC], capture_output=True, text=True, check=True)
        runs.append(done.stdout.split())
    assert len(runs[0]) == 4
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[0][3]
