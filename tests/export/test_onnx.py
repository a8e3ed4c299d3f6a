from __future__ import annotations

import builtins
import logging

import onnx
import pytest
import safetensors.torch
import torch
from torch import nn

import slcompile
from slcompile.export import onnx as export
from tests.testing import CONFIG, some_of

IDS = torch.arange(34).reshape(2, 17)


def test_dynamic_axes_run_at_other_shapes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    slcompile.factorize_(layer, CONFIG)
    batch = torch.export.Dim("batch")
    path = tmp_path / "layer.onnx"
    slcompile.export_onnx(layer, torch.randn(4, 64), path, input_names=["x"], dynamic_shapes=({0: batch},))
    x = torch.randn(7, 64)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_caches_have_the_names_of_hugging_face(tmp_path, name):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, input_ids, past_key_values=None, cache=None):
            old = past_key_values or cache
            new = self.layer(input_ids)
            key, value = (torch.cat([old[part][0], new], 1) for part in ("key_cache", "value_cache"))
            return {"logits": new, name: {"key_cache": [key], "value_cache": [value]}}

    old = {"key_cache": [torch.randn(2, 3, 64)], "value_cache": [torch.randn(2, 3, 64)]}
    model = slcompile.factorize_(Cached(), CONFIG)
    # The order of keyword arguments is not that of the signature: names must follow the tensors all the same.
    kwargs = {name: old, "input_ids": torch.randn(2, 5, 64)}
    report = slcompile.export_onnx(model, (), tmp_path / "model.onnx", kwargs=kwargs)
    graph = onnx.load(report.path).graph
    shapes = {each.name: each.type.tensor_type.shape.dim[1].dim_value for each in graph.input}
    assert shapes == {"input_ids": 5, "past_key_values.0.key": 3, "past_key_values.0.value": 3}
    assert [each.name for each in graph.output] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.slow
def test_a_constant_that_the_model_makes_has_its_value(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.tied = nn.Linear(64, 64)

        def forward(self, x):
            least = torch.tensor(-0.25, device=x.device, dtype=x.dtype)  # without a value where x is on the meta device
            return torch.where(self.first(x) > 0, self.tied(x), least)

    model = slcompile.factorize_(Shifted(), CONFIG)
    nn.init.normal_(model.first.weight_sl.B)
    report = slcompile.export_onnx(model, torch.randn(3, 64), tmp_path / "model.onnx")
    assert report.max_abs < 1e-5
    stored = [each.name for each in onnx.load(report.path).graph.initializer]
    assert len([name for name in stored if name.endswith(".weight")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", some_of([True, False], [True]), ids=["layers wrapped", "compiled in place"])
def test_a_compiled_model_is_exported_under_its_names_and_really_compared(tmp_path, wrapped, aten_kernels):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.down(self.up(x))

    model, x = Two(), torch.randn(4, 64)
    if wrapped:
        for name, layer in list(model.named_children()):
            setattr(model, name, torch.compile(layer, backend="sltrain", options={"rank": 8}))
    else:
        model.compile(backend="sltrain", options={"rank": 8})
    model(x).sum().backward()
    report = slcompile.export_onnx(model, x, tmp_path / "model.onnx", dtype=torch.float16)
    assert set(report.merged) == {"up.weight", "down.weight"}
    assert {"up.bias", "down.bias"} <= {each.name for each in onnx.load(report.path).graph.initializer}
    (merged,) = [each for each in report.comparisons if each.against == "merged"]
    # float16 weights cannot give the same: zero would mean that the trained model was compared with itself.
    assert 0 < merged.max_rel < 64 * 2**-11
    directory = slcompile.save_merged(model, tmp_path / "dense")
    saved = safetensors.torch.load_file(directory / "model.safetensors")
    assert set(saved) == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_a_second_shape_that_the_model_refuses_is_said(tmp_path, caplog):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) if torch.compiler.is_exporting() else self.layer(x.view(4, 64))

    model = slcompile.factorize_(Fixed(), CONFIG)
    with caplog.at_level(logging.WARNING, "slcompile"):
        report = slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "m.onnx", dynamic_shapes=({0: "batch"},))
    assert "compared at one shape only" in caplog.text
    assert {each.shape for each in report.comparisons} == {(4, 64)}


def test_bfloat16_is_exported_in_float32(tmp_path):
    layer = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)).bfloat16(), CONFIG)
    report = slcompile.export_onnx(layer, torch.randn(4, 64), tmp_path / "layer.onnx")
    (weight,) = [each for each in onnx.load(report.path).graph.initializer if each.name == "0.weight"]
    assert weight.data_type == onnx.TensorProto.FLOAT
    assert layer[0].bias.dtype is torch.bfloat16


def test_infinities_of_the_same_places_do_not_differ(tmp_path):
    class Masked(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y.masked_fill(torch.ones_like(y, dtype=torch.bool).triu(40), float("-inf"))

    model = slcompile.factorize_(nn.Sequential(Masked(64, 64)), CONFIG)
    for each in slcompile.export_onnx(model, torch.randn(64, 64), tmp_path / "model.onnx").comparisons:
        assert each.max_abs < 1e-5
        assert 0 < each.max_rel < 1e-5 or each.max_abs == 0
        assert sum(each.histogram.values()) == 64 * 64


@pytest.mark.slow
def test_a_difference_beyond_tolerance_is_an_error_and_leaves_the_old_file(tmp_path):
    class Drifting(nn.Module):
        """Gives another result each time that it runs: what the file holds cannot be what the model computes."""

        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(64, 64), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    model = slcompile.factorize_(Drifting(), CONFIG)
    with pytest.raises(ValueError, match=r"differs from the trained model by .* more than the tolerance"):
        slcompile.export_onnx(model, torch.randn(4, 64), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_bad_paths_and_weights_are_refused_before_any_work(tmp_path, monkeypatch):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="path must be a file, got the directory"):
        slcompile.export_onnx(model, x, tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        slcompile.export_onnx(model, x, tmp_path / "missing" / "model.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(ValueError, match="cannot be written"):
            slcompile.export_onnx(model, x, tmp_path / "model.onnx")
    with torch.no_grad():
        model[0].weight_sl.values[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"parameter 0\.weight_sl\.values contains NaN or Inf"):
        slcompile.export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_libraries_are_named_with_the_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_onnxruntime(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError("no module", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(ImportError, match=r'exporting needs onnxruntime: pip install "slcompile\[onnx\]"'):
        slcompile.export_onnx(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "model.onnx")


def test_weights_that_the_graph_does_not_read_are_reported(tmp_path, caplog):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    caplog.set_level(logging.ERROR)
    report = slcompile.export_onnx(slcompile.factorize_(Unused(), CONFIG), torch.randn(2, 64), tmp_path / "m.onnx")
    assert (report.merged, report.absent) == (("used.weight",), ("spare.weight",))


def test_outputs_that_are_inputs_or_other_outputs_have_names_of_their_own(tmp_path):
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            y = self.layer(x)
            return y, y, x

    model, x = slcompile.factorize_(Passing(), CONFIG), torch.randn(4, 64)
    report = slcompile.export_onnx(model, x, tmp_path / "model.onnx", input_names=["x"])
    session = pytest.importorskip("onnxruntime").InferenceSession(report.path)
    assert [each.name for each in session.get_inputs()] == ["x"]
    assert [each.name for each in session.get_outputs()] == ["output_0", "output_1", "output_2"]
    for found, expected in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected)


@pytest.mark.parametrize("opset", [-3, 0, 999])
def test_an_opset_that_onnx_does_not_know_is_refused_before_any_work(opset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=f"opset must be one to which this torch converts graphs, got {opset}"):
        slcompile.export_onnx(nn.Linear(64, 64), torch.randn(4, 64), tmp_path / "model.onnx", opset=opset)


@pytest.mark.slow
def test_an_opset_to_which_graphs_are_not_converted_is_refused(tmp_path):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    with pytest.raises(ValueError, match="opset must be one to which this torch converts graphs, got 3"):
        slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "model.onnx", opset=3)
    assert list(tmp_path.iterdir()) == []


class Mixed(nn.Module):
    """Keeps a result of its last call, counts calls, and multiplies by a tensor that is no parameter or buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.factor, self.mask = nn.Linear(64, 64), torch.linspace(1, 2, 64), nn.Parameter(torch.ones(64))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x, mask):
        self.calls += 1
        self.last = self.last + 1
        y = self.layer(x) * self.factor * self.mask * mask
        self.loss = y.square().mean()
        return {"x": y, "mask": self.layer.weight, "linear": x}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_a_model_holds_beside_its_weights_is_exported_and_left_as_it_is(dtype, tmp_path):
    """Inputs, outputs, weights and intermediate values have the same names there."""
    model, x, mask = slcompile.factorize_(Mixed(), CONFIG).to(dtype), torch.randn(4, 64), torch.rand(64)
    model.train()(x.to(dtype), mask.to(dtype))
    report = slcompile.export_onnx(model, (x, mask), tmp_path / "model.onnx", dtype=torch.float32, verify=False)
    assert (model.calls, model.last) == (1, 1)
    slcompile.export_onnx(model, (x, mask), tmp_path / "verified.onnx", dtype=torch.float32)
    assert (model.calls, model.last) == (1, 1)
    session = pytest.importorskip("onnxruntime").InferenceSession(report.path)
    assert [each.name for each in session.get_inputs()] == ["x", "input_mask"]
    assert [each.name for each in session.get_outputs()] == ["output_x", "output_mask", "linear"]
    assert {"layer.weight", "mask"} <= {each.name for each in onnx.load(report.path).graph.initializer}
    found = session.run(None, {"x": x.numpy(), "input_mask": mask.numpy()})
    for got, want in zip(found, model.float()(x, mask).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want.detach())


@pytest.mark.slow
def test_an_export_within_autocast_is_that_without(tmp_path):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        report = slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "model.onnx")
    assert report.max_rel < 64 * 2**-24


def test_layers_that_hold_their_weights_twice_are_exported_from_the_meta_device(tmp_path, monkeypatch):
    """nn.LSTM has a list of its parameters."""
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 32)), CONFIG)
    monkeypatch.setattr(export, "untouched_on_cpu", lambda twin: pytest.fail("moved"))
    monkeypatch.setattr(export, "_dense_graph", lambda twin, *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slcompile.export_onnx(model, torch.randn(4, 2, 64), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_shapes": {"inputs": {0: "batch"}}}, "of the arguments given, input, got 'inputs'"),
        ({"dynamic_shapes": ({0: "batch"}, {0: "batch"})}, "dynamic_shapes must be of the 1 arguments given, got 2"),
        ({"input_names": ["x"], "output_names": ["x"]}, "must differ from each other .* got 'x' 2 times"),
        ({"input_names": ["0.bias"]}, r"from the names of weights, got '0\.bias' 2 times"),
    ],
)
def test_names_that_cannot_be_are_refused(options, message, tmp_path):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    with pytest.raises(ValueError, match=message):
        slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_arguments_by_name_in_the_place_of_positional_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args must be a sequence of arguments, or a tensor, got dict; what has names"):
        slcompile.export_onnx(nn.Linear(64, 64), {"input": torch.randn(4, 64)}, tmp_path / "model.onnx")


def test_a_model_on_the_meta_device_is_refused(tmp_path):
    with torch.device("meta"):
        model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    for write in (lambda: slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "model.onnx"),
                  lambda: slcompile.save_merged(model, tmp_path / "dense")):  # fmt: skip
        with pytest.raises(ValueError, match=r"0\.bias is on the meta device and holds no numbers"):
            write()
    assert not list(tmp_path.iterdir())
