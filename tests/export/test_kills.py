"""Saving over an old model that is killed at any step: the directory is the old model, the new one or refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import slcompile
import slcompile.integrations.transformers
from slcompile import files
from tests.testing import CONFIG, randomize
from tests.zoo import tiny

IDS = torch.arange(34).reshape(2, 17)


@cache
def llama(seed: int, **options: Any) -> nn.Module:
    """Of another alpha and another epsilon for each seed, so that a file of another model changes the outputs."""
    torch.manual_seed(seed)
    model = tiny("llama", num_hidden_layers=2, rms_norm_eps=10.0 ** (-5 * seed))
    config = slcompile.SLConfig(**{"rank": 4, "density": 0.05, "alpha": 8 * seed, **options})
    return randomize(slcompile.factorize_(model, config)).eval()


def merged(seed: int, directory: Path, **options: Any) -> None:
    slcompile.save_merged(llama(seed), directory, **options)


def merged_shards(seed: int, directory: Path) -> None:
    merged(seed, directory, shard_size=150_000)


def fewer_shards(seed: int, directory: Path) -> None:
    merged(seed, directory, shard_size=250_000)


def factors(seed: int, directory: Path) -> None:
    slcompile.save_factorized(llama(seed), directory)


def adapter(seed: int, directory: Path) -> None:
    slcompile.save_peft(llama(seed, density=0, base="frozen"), directory)


def pretrained(directory: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(directory)


def adapted(directory: Path) -> nn.Module:
    torch.manual_seed(0)
    return slcompile.load_peft(tiny("llama", num_hidden_layers=2), directory)


def loaded(load: Callable[[Path], nn.Module], directory: Path) -> Tensor | None:
    """What the model of a directory computes; None where it is refused."""
    try:
        model = load(directory)
    except (OSError, ValueError) as error:
        if "config.json" in str(error):
            return None
        raise
    with torch.no_grad():
        return model.eval()(IDS).logits


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the step-th move or removal from now on raise, and no process that goes on do another one."""
    steps: list[str] = []

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def patched(*args: Any, **kwargs: Any) -> None:
            steps.append(real.__name__)
            if len(steps) >= step:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        return patched

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "replace": counted(os.replace)}))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "load"),
    [
        pytest.param(merged, merged, pretrained, marks=pytest.mark.long),
        (merged, merged_shards, pretrained),
        pytest.param(merged_shards, merged, pretrained, marks=pytest.mark.long),
        pytest.param(merged_shards, merged_shards, pretrained, marks=pytest.mark.long),
        (merged_shards, fewer_shards, pretrained),
        (factors, merged, pretrained),
        (merged, factors, pretrained),
        (factors, factors, pretrained),
        (factors, factors, slcompile.load_factorized),
        (adapter, adapter, adapted),
    ],
    ids=lambda each: each.__name__,
)
def test_a_kill_at_any_step_leaves_no_mix_of_two_models(first, then, load, tmp_path, monkeypatch):
    first(1, tmp_path / "old")
    old = loaded(load, tmp_path / "old")
    then(2, tmp_path / "new")
    new = loaded(load, tmp_path / "new")
    outcomes = []
    while "finished" not in outcomes:
        directory = tmp_path / str(len(outcomes))
        shutil.copytree(tmp_path / "old", directory)
        with monkeypatch.context() as patched:
            kill_at(len(outcomes) + 1, patched)
            try:
                then(2, directory)
                outcomes.append("finished")
            except KeyboardInterrupt:
                outcomes.append("killed")
        got = loaded(load, directory)
        if outcomes[-1] == "killed":
            outcomes[-1] = "refused" if got is None else "old" if torch.equal(got, old) else "new"
        assert got is None or torch.equal(got, old if outcomes[-1] == "old" else new)
        if got is None and "refused" not in outcomes[:-1]:
            then(2, directory)
            assert torch.equal(loaded(load, directory), new)
    assert outcomes == sorted(outcomes, key=["old", "refused", "new", "finished"].index)
    assert sorted(os.listdir(directory)) == sorted(os.listdir(tmp_path / "new"))
    assert {"old", "refused"} <= set(outcomes)


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(slcompile.factorize_(nn.Sequential(nn.Linear(64, 96)), CONFIG))


def test_one_file_takes_the_place_of_another_in_one_step(tmp_path, monkeypatch):
    slcompile.save_merged(linear(0), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        kill_at(1, patched)
        with pytest.raises(KeyboardInterrupt):
            slcompile.save_merged(linear(1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with monkeypatch.context() as patched:
        kill_at(2, patched)
        with pytest.raises(KeyboardInterrupt):
            slcompile.save_merged(linear(1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != before
