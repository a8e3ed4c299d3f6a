"""The memory of an export is one dense weight above the factored model's, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

EXPORT = """
import json, pathlib, re, sys
import onnx, onnx_ir, onnxruntime, onnxscript, torch, torch.onnx
import slcompile
from slcompile.weight import SLWeight

directory = pathlib.Path(sys.argv[1])

def mebibytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

def build(count, size):
    layers = [torch.nn.Linear(size, size, bias=False, device="meta") for _ in range(count)]
    config = slcompile.SLConfig(rank=64, density=0.03)
    model = slcompile.factorize_(torch.nn.Sequential(*layers), config).to_empty(device="cpu")
    for weight in model.modules():
        if isinstance(weight, SLWeight):
            weight.reset_parameters()
            with torch.no_grad():
                weight.B.normal_(std=0.1)
    return model

def export(model, size, name):
    return slcompile.export_onnx(model, torch.ones(1, size), directory / name, verify=False)

export(build(1, 256), 256, "warm.onnx")
model = build(14, 6400)
before = mebibytes("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
report = export(model, 6400, "model.onnx")
growth = mebibytes("VmHWM") - before

initializers = onnx_ir.load(report.path).graph.initializers
shapes = [list(each.shape) for each in initializers.values()]
for name in ("0.weight", "13.weight"):
    stored = torch.from_numpy(initializers[name].const_value.numpy()[[0, 3, 6399]].copy())
    assert torch.equal(stored, model[int(name.split(".")[0])].weight[[0, 3, 6399]]), name
factored = sum(each.nbytes for each in model.parameters()) / 2**20
print(json.dumps({"growth": growth, "shapes": shapes, "files": sum(report.files.values()), "factored": factored}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_more_than_two_gibibytes_are_streamed(tmp_path):
    try:
        child = subprocess.run(
            [sys.executable, "-c", EXPORT, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert child.returncode == 0, child.stderr
    finally:
        for file in tmp_path.iterdir():
            file.unlink()
    figures = json.loads(child.stdout.splitlines()[-1])
    dense = 6400 * 6400 * 4 / 2**20
    print(
        f"\n{figures['files'] / 2**30:.2f} GiB written; peak memory {figures['growth']:.0f} MiB above a factored "
        f"model of {figures['factored']:.0f} MiB; a dense weight is {dense:.0f} MiB"
    )
    assert figures["files"] > 2 * 2**30
    assert figures["shapes"] == [[6400, 6400]] * 14
    # A composed weight and its product of B and A, and what torch, its exporter and the operating system need.
    assert figures["growth"] <= 2 * dense + 300
