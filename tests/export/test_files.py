"""The files of an export: whole or not there, whenever it is killed or the disk is full, and ordinary."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import site
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import slcompile
from slcompile import files
from slcompile.export import onnx as export

CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=0)
X = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)
BYTES = 4 * (2 * 64 * 96 + 96 + 64)  # of the model's float32 weights; more than half of it holds one of the two
SHARD = 3 * BYTES // 5


def network(seed: int = 0, config: slcompile.SLConfig = CONFIG) -> nn.Module:
    """64 -> 96 -> 64 with every factor random."""
    torch.manual_seed(seed)
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"input": X.numpy()})[0]


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def assert_computes(path: Path, model: nn.Module) -> None:
    # Sums of 64 and then of 96 products, in another order than torch's: each side rounds so often, a random walk of
    # halves of a unit in the last place, whose length is the square root of their number.
    wanted = model(X).detach()
    atol = math.sqrt(2 * (64 + 96)) * 2**-24 * wanted.abs().max()
    torch.testing.assert_close(torch.from_numpy(run(path)), wanted, rtol=0, atol=atol)


def test_weights_in_a_file_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INLINE_LIMIT", BYTES // 2)
    model, path, seen = network(), tmp_path / "model.onnx", []
    report = slcompile.export_onnx(model, X, path, progress=lambda done, total: seen.append((done, total)))
    (data,) = [each for each in names(tmp_path) if each != "model.onnx"]
    assert data.startswith("model-")
    assert data.endswith(".data")
    assert {each.name: size for each, size in report.files.items()} == {
        name: (tmp_path / name).stat().st_size for name in names(tmp_path)
    }
    assert seen == [(1, 3), (2, 3), (3, 3)]  # the smallest of the four, 256 bytes, stays in the model file
    assert_computes(path, model)


def test_shards(tmp_path):
    model, path = network(), tmp_path / "model.onnx"
    report = slcompile.export_onnx(model, X, path, shard_size=SHARD)
    assert len(report.files) == 3
    assert set(names(tmp_path)) == {each.name for each in report.files}
    assert all(size <= SHARD for each, size in report.files.items() if each != path)
    assert_computes(path, model)


@pytest.mark.slow
def test_an_export_over_an_old_one_leaves_only_the_new_files(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    other = tmp_path / "model-other.data"
    other.write_bytes(b"of somebody else")
    kept = set()
    for seed, options in enumerate(({"shard_size": SHARD}, {"shard_size": BYTES}, {}, {"dtype": torch.float16})):
        model = network(seed)
        kept = {each.name for each in slcompile.export_onnx(model, X, path, **options).files}
        assert set(names(tmp_path)) == kept | {other.name}
    assert kept == {"model.onnx"}


def test_a_model_and_its_data_can_be_moved_together(tmp_path):
    model, there = network(), tmp_path / "there"
    (tmp_path / "here").mkdir()
    slcompile.export_onnx(model, X, tmp_path / "here" / "model.onnx", shard_size=BYTES)
    (tmp_path / "here").rename(there)
    assert_computes(there / "model.onnx", model)


# A process that has imported everything, and for each moment a fork of it that exports over an old model and is killed.
FAULTS = """
import json, os, pathlib, resource, signal, sys, types
import onnx, onnx_ir, onnxruntime, onnxscript, torch
from slcompile import files
from slcompile.export import onnx as export
sys.path.insert(0, sys.argv[1])
from test_files import BYTES, X, network

torch.set_num_threads(1)  # a fork has no threads of its parent
files.os = types.SimpleNamespace(**vars(os))  # others replace files, too
export.export_onnx(network(), X, pathlib.Path(sys.argv[2]) / "first.onnx", verify=False)  # imports what is left

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at(owner, name, number, before):
    real, calls = getattr(owner, name), []
    def patched(*args, **kwargs):
        calls.append(name)
        if before and len(calls) == number:
            kill()
        result = real(*args, **kwargs)
        if not before and len(calls) == number:
            kill()
        return result
    setattr(owner, name, patched)

def write_limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 10, BYTES // 10))

MOMENTS = {
    "before saving": lambda: kill_at(export, "_save", 1, True),
    "after saving": lambda: kill_at(export, "_save", 1, False),
    "before moving": lambda: kill_at(files.os, "replace", 1, True),
    "after moving a data file": lambda: kill_at(files.os, "replace", 1, False),
    "before moving the model": lambda: kill_at(files.os, "replace", 3, True),
    "after moving the model": lambda: kill_at(files.os, "replace", 3, False),
    "after removing a stale file": lambda: kill_at(pathlib.Path, "unlink", 1, False),
    "while writing": lambda: None,
    "disk full": write_limit,
    "never": lambda: None,
}

statuses = {}
for moment, prepare in MOMENTS.items():
    directory = pathlib.Path(sys.argv[2]) / moment.replace(" ", "-")
    process = os.fork()
    if process == 0:
        prepare()
        progress = (lambda done, total: done == 2 and kill()) if moment == "while writing" else None
        try:
            export.export_onnx(
                network(int(sys.argv[3])), X, directory / "model.onnx", verify=False, progress=progress,
                **json.loads(sys.argv[4]),
            )
        except OSError as error:
            os._exit(100 + (error.errno or 0))
        os._exit(0)
    statuses[moment] = os.waitpid(process, 0)[1]
print(json.dumps(statuses))
"""
KILLED = [
    "before saving", "while writing", "after saving", "before moving", "after moving a data file",
    "before moving the model", "after moving the model", "after removing a stale file",
]  # fmt: skip
NEXT = {  # what is exported over network(0) in two shards: the seed of the new weights, and the options
    "new weights": (1, {"shard_size": SHARD}),
    "the same weights, compact": (0, {"shard_size": BYTES // 5, "compact": True}),
}


@pytest.fixture(
    scope="module",
    params=[each if each == "new weights" else pytest.param(each, marks=pytest.mark.long) for each in NEXT],
)
def faults(request, tmp_path_factory):
    """What is left after each fault, the status of each process, and what the old and the new model compute."""
    root = tmp_path_factory.mktemp("faults")
    seed, options = NEXT[request.param]
    first = tmp_path_factory.mktemp("first")
    slcompile.export_onnx(network(0), X, first / "model.onnx", shard_size=SHARD)
    old = run(first / "model.onnx"), names(first)
    directories = {moment: root / moment.replace(" ", "-") for moment in [*KILLED, "disk full", "never"]}
    for directory in directories.values():
        shutil.copytree(first, directory)
    command = [sys.executable, "-c", FAULTS, str(Path(__file__).parent), str(root), str(seed), json.dumps(options)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    never = directories["never"]
    return directories, json.loads(child.stdout.splitlines()[-1]), old, (run(never / "model.onnx"), names(never))


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_a_kill_leaves_the_old_model_or_the_new_one(faults, moment):
    directories, statuses, (old, _), (new, _) = faults
    assert statuses[moment] == signal.SIGKILL
    got = run(directories[moment] / "model.onnx")
    # onnxruntime repeats itself bit for bit.
    wanted = new if moment in ("after moving the model", "after removing a stale file") else old
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_files_and_nothing_else(faults):
    directories, statuses, (old, old_names), _ = faults
    assert statuses["disk full"] == (100 + errno.EFBIG) << 8  # an OSError; EFBIG is what the resource limit gives
    assert names(directories["disk full"]) == old_names
    np.testing.assert_array_equal(run(directories["disk full"] / "model.onnx"), old)


def test_without_a_fault_the_new_files_are_there(faults):
    _, statuses, (_, old_names), (_, new_names) = faults
    assert statuses["never"] == 0
    assert len(new_names) == len(set(new_names) - set(old_names)) + 1  # only model.onnx has an old name


@pytest.mark.slow
def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda directory: usage)
    monkeypatch.setattr("onnx_ir.save", lambda *args, **kwargs: pytest.fail("something was written"))
    with pytest.raises(OSError, match=r"the weights take 49,\d{3} bytes and 1,000 are free") as caught:
        slcompile.export_onnx(network(), X, path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "path must be a file, got the directory"),
        ("missing/model.onnx", "does not exist"),
        ("file/model.onnx", "file is a file"),
        ("model.json", r"path must not end in \.json, which is onnx's name for files of text; got 'model\.json'"),
    ],
)
def test_bad_targets_are_named(target, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        slcompile.export_onnx(network(), X, tmp_path / target)
    assert names(tmp_path) == ["file"]


def test_a_read_only_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path.name} cannot be written"):
        slcompile.export_onnx(network(), X, tmp_path / "model.onnx")
    assert names(tmp_path) == []


def test_a_read_only_directory_in_another_that_can_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "dense").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "dense")
    with pytest.raises(ValueError, match=r"directory .*/dense cannot be written"):
        slcompile.save_merged(network(), tmp_path / "dense")
    assert names(tmp_path / "dense") == []


def test_a_mounted_directory_needs_no_other_one(tmp_path, monkeypatch):
    """Its parent may be of another file system, to which nothing is moved, and need not be writable."""
    directory, real = tmp_path / "dense", os.replace
    directory.mkdir()

    def within(source, target):
        assert directory in Path(source).parents
        real(source, target)

    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name == "dense")
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "replace": within}))
    slcompile.save_merged(network(), directory)
    assert names(directory) == ["model.safetensors"]


def test_a_failed_save_leaves_no_new_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "move_over", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slcompile.save_merged(network(), tmp_path / "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, "2GB", True])
def test_a_shard_size_that_is_no_number_of_bytes_is_named(size, tmp_path):
    with pytest.raises(ValueError, match=f"shard_size must be an int >= 1 or None, got {size!r}"):
        slcompile.export_onnx(network(), X, tmp_path / "model.onnx", shard_size=size)
    with pytest.raises(ValueError, match=f"shard_size must be an int >= 1, got {size!r}"):
        slcompile.save_merged(network(), tmp_path / "dense", shard_size=size)
    assert names(tmp_path) == []


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_the_files(tmp_path):
    slcompile.export_onnx(network(), X, tmp_path / "inline.onnx")
    slcompile.export_onnx(network(), X, tmp_path / "beside.onnx", shard_size=BYTES)
    slcompile.export_onnx(network(), X, tmp_path / "compact.onnx", compact=True)
    paths = {Path.cwd(), Path.home(), tmp_path, Path(sys.prefix), *map(Path, site.getsitepackages())}
    paths |= {Path(module.__file__).parent for module in (slcompile, torch, onnx)}
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert not [each for each in paths if len(str(each)) > 1 and str(each).encode() in content], file


@pytest.mark.slow
def test_the_file_describes_itself(tmp_path):
    model = network()
    report = slcompile.export_onnx(model, X, tmp_path / "model.onnx", metadata={"owner": "us"})
    stored = {each.key: each.value for each in onnx.load(report.path).metadata_props}
    assert stored == report.metadata == onnxruntime.InferenceSession(report.path).get_modelmeta().custom_metadata_map
    assert stored["producer"].startswith("slcompile ")
    assert (stored["dtype"], stored["factorized_weights"], stored["owner"]) == ("float32", "2", "us")
    assert len(bytes.fromhex(stored["state_sha256"])) == 32
    assert float(stored["onnxruntime_max_abs"]) == pytest.approx(report.max_abs, rel=1e-3)  # four digits
    assert float(stored["onnxruntime_max_rel"]) == pytest.approx(report.max_rel, rel=1e-3)
    assert {"merged_max_abs", "merged_max_rel"} <= set(stored)

    again = slcompile.export_onnx(model, X, tmp_path / "again.onnx", dtype=torch.float16, verify=False)
    assert again.metadata["state_sha256"] == stored["state_sha256"]
    assert again.metadata["dtype"] == "float16"
    assert not [key for key in again.metadata if "max" in key]
    with torch.no_grad():
        model[0].weight_sl.values[0, 0] += 1
    changed = slcompile.export_onnx(model, X, tmp_path / "changed.onnx", verify=False)
    assert changed.metadata["state_sha256"] != stored["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("support", "dtype"),
    [
        ("stratified", torch.float16),
        ("vector", torch.float32),
        ("uniform", torch.float32),
        pytest.param("stratified", torch.float32, marks=pytest.mark.long),
        pytest.param("vector", torch.float16, marks=pytest.mark.long),
        pytest.param("uniform", torch.float16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_compact(support, dtype, tmp_path):
    config = slcompile.SLConfig(rank=8, density=0.02, support=support)
    model = slcompile.factorize_(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    x, path = torch.randn(4, 256), tmp_path / "model.onnx"
    merged = slcompile.export_onnx(model, x, tmp_path / "merged.onnx", dtype=dtype)
    report = slcompile.export_onnx(model, x, path, dtype=dtype, compact=True)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {each.domain for each in proto.opset_import} == {""}
    assert set(report.merged) == {"0.weight", "2.weight"}

    # Of each weight, B and A of 256 x 8, 2 % of values and their int32 positions, in place of 256 x 256.
    factors = 2 * 256 * 8 + 0.02 * 256**2 * (1 + 4 / dtype.itemsize)
    graph = 8192  # bytes for names, nodes and biases
    assert path.stat().st_size < 2 * factors * dtype.itemsize + graph
    assert path.stat().st_size < merged.path.stat().st_size / 3

    # float32: a weight of 9 summands, then 256 products, each sum as a random walk of roundings, in two layers.
    # float16: factors, product, sum and activations are rounded, each to 11 bits, and the same again.
    bound = {torch.float32: 2 * 16 * 2**-24, torch.float16: 8 * 2**-11}[dtype]
    assert report.max_rel < bound

    # At load the constants are folded: what is left runs on dense weights.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options)
    folded = Counter(each.op_type for each in onnx.load(tmp_path / "folded.onnx").graph.node)
    assert not {"ScatterElements", "GatherElements", "Reshape", "Add"} & set(folded), folded


@pytest.mark.slow
def test_compact_rounds_a_float64_model_to_no_less(tmp_path):
    model = network().double()
    report = slcompile.export_onnx(model, X.double(), tmp_path / "compact.onnx", compact=True)
    assert report.dtype is torch.float64
    assert report.max_rel < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("of_B", "of_A"), [(3e4, 1e-6), (1e-6, 3e4), (1e6, 1e-7)])
def test_compact_holds_in_float16_what_the_weight_holds(of_B, of_A, tmp_path):
    model = network(config=slcompile.SLConfig(rank=8, density=0.05, seed=0, alpha=64.0))
    with torch.no_grad():
        for weight in (model[0].weight_sl, model[2].weight_sl):
            weight.B.copy_(weight.B.sign() * of_B)
            weight.A.copy_(weight.A.sign() * of_A)
    report = slcompile.export_onnx(model, X, tmp_path / "compact.onnx", dtype=torch.float16, compact=True)
    assert report.max_rel < 1e-2


@pytest.mark.slow
def test_compact_refuses_parts_beyond_the_range_of_the_dtype(tmp_path):
    model = network()
    with torch.no_grad():
        weight = model[2].weight_sl
        weight.B.zero_()
        weight.B[:, 0], weight.B[:, 1] = 1e6, -1e6
        weight.A.fill_(1e6)  # the two terms cancel
    options = {"dtype": torch.float16, "compact": True, "verify": False}
    message = r"B of weight 2\.weight has values beyond the range of torch\.float16; nothing was written"
    with pytest.raises(ValueError, match=message):
        slcompile.export_onnx(model, X, tmp_path / "compact.onnx", **options)
    assert not list(tmp_path.iterdir())
