from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

import slcompile


@pytest.mark.slow
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # an export takes half a second
)
@given(
    rows=st.integers(32, 130),
    columns=st.integers(32, 130),
    rank=st.integers(1, 6),
    density=st.floats(0.001, 0.3),
    support=st.sampled_from(["stratified", "vector", "uniform"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_file_holds_the_merged_weight_and_runs(rows, columns, rank, density, support, dtype, bias, seed):
    torch.manual_seed(seed)
    config = slcompile.SLConfig(rank=rank, density=density, support=support)
    model = slcompile.factorize_(nn.Sequential(nn.Linear(columns, rows, bias=bias)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(5, columns)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        report = slcompile.export_onnx(model, x, path, dtype=dtype)
        stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        (got,) = onnxruntime.InferenceSession(path).run(None, {"input": x.to(dtype).numpy()})

    factors = slcompile.factors(model)["0.weight"]
    merged = slcompile.merged_state_dict(model)["0.weight"]
    np.testing.assert_array_equal(stored["0.weight"], merged.to(dtype).numpy())
    assert report.merged == ("0.weight",)

    # The stored weight from its formula, in float64: S holds each value once, and nothing else.
    low_rank = factors.scale * factors.B.double() @ factors.A.double()
    sparse = merged.double() - low_rank
    terms = factors.scale * factors.B.double().abs() @ factors.A.double().abs()
    noise = (rank + 3) * 2**-24 * (terms + merged.double().abs())  # rank products, the scale, the sum and its rounding
    values = factors.values.double().flatten().sort().values
    outliers = sparse.abs() > noise
    assert int(outliers.sum()) <= values.numel()
    assert (sparse.abs().sum() - values.abs().sum()).abs() <= noise.sum()

    # A dot product of n terms errs by at most n units of roundoff times the sum of its magnitudes. In float16 the sum
    # may be made in float32; what enters it and what leaves it is rounded to 11 bits.
    unit = 2**-24 if dtype is torch.float32 else 2**-11
    weight = torch.tensor(stored["0.weight"]).double()
    b = torch.zeros(rows) if not bias else model[0].bias.detach().to(dtype)
    wanted = x.to(dtype).double() @ weight.T + b.double()
    magnitude = x.to(dtype).double().abs() @ weight.abs().T + b.double().abs()
    assert ((torch.from_numpy(got).double() - wanted).abs() <= (columns + 1) * unit * magnitude).all()
