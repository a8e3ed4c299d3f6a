from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import slcompile
from tests.testing import CONFIG, some_of
from tests.zoo import tiny

BATCH, LENGTH = {0: "batch_size"}, {0: "batch_size", 1: "sequence_length"}

# Differences add up as a random walk: the square root of the number of roundings between input and output, times
# half a unit in the last place. At most 100 operators follow each other here, and a sum has at most 256 terms;
# onnxruntime's CPU kernels add float16 in float32, so that such a sum is rounded once.
BOUND = {torch.float32: math.sqrt(100 * 256) * 2**-24, torch.float16: math.sqrt(100) * 2**-11}


def mixtral() -> nn.Module:
    model = tiny("mixtral")
    # The others have no ONNX translation in torch 2.13: "grouped_mm" counts with an integer histc, "eager" loops over
    # the experts that were hit.
    model.set_experts_implementation("batched_mm")
    return model


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()
        )
        self.classifier = nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 10))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.features(pixel_values))}


def text(batch: int, length: int) -> dict[str, Any]:
    ids = torch.randint(128, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0  # the last text is shorter
    return {"input_ids": ids, "attention_mask": mask}


def causal(batch: int, length: int) -> dict[str, Any]:
    return {**text(batch, length), "use_cache": False}


def two_texts(batch: int, length: int) -> dict[str, Any]:
    return {**text(batch, length), "decoder_input_ids": torch.randint(128, (batch, length)), "use_cache": False}


def images(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def small_images(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


Make = Callable[..., Any]
ARCHITECTURES: dict[str, tuple[Make, Make, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (lambda: tiny("llama", num_key_value_heads=2), causal, ("input_ids", "attention_mask"), ("logits",)),
    "gpt2": (lambda: tiny("gpt2", n_layer=2), causal, ("input_ids", "attention_mask"), ("logits",)),
    "bert": (lambda: tiny("bert"), text, ("input_ids", "attention_mask"), ("logits",)),
    "t5": (
        lambda: tiny("t5"),
        two_texts,
        ("input_ids", "attention_mask", "decoder_input_ids"),
        ("logits", "encoder_last_hidden_state"),
    ),
    "vit": (lambda: tiny("vit"), images, ("pixel_values",), ("logits",)),
    "mixtral": (mixtral, causal, ("input_ids", "attention_mask"), ("logits",)),
    "cnn": (Cnn, small_images, ("pixel_values",), ("logits",)),
}  # fmt: skip


def trained(model: nn.Module, inputs: dict[str, Any], config: slcompile.SLConfig = CONFIG) -> nn.Module:
    """Factorized by its graph, and three steps away from its start: B is zero there."""
    slcompile.factorize_(model, config, example_kwargs=inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        (model(**inputs)["logits"] - 1).square().mean().backward()  # logits near 0 would have large relative errors
        optimizer.step()
        optimizer.zero_grad()
    return model


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: None if name == "use_cache" else BATCH if name == "pixel_values" else LENGTH for name in inputs}


def initializers(path: Any) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


MARKS: dict[str, Any] = {"llama": (), "cnn": (), "bert": pytest.mark.long, "vit": pytest.mark.long}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in ARCHITECTURES],
)
def architecture(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(0)
    make, inputs, _, _ = ARCHITECTURES[request.param]
    yield request.param, trained(make(), inputs(2, 17))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
def test_round_trip(architecture, dtype, tmp_path):
    name, model = architecture
    _, make_inputs, input_names, output_names = ARCHITECTURES[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = make_inputs(2, 17)
    report = slcompile.export_onnx(
        model, (), tmp_path / "model.onnx", kwargs=inputs, dynamic_shapes=dynamic_shapes(inputs), dtype=dtype
    )
    print(f"\n{name} {dtype}: {report.max_rel:.2e} relative")

    # The report: two kinds of comparison, of each output, at two shapes.
    assert [(each.against, each.output) for each in report.comparisons] == [
        (against, output) for _ in range(2) for against in ("merged", "onnxruntime") for output in output_names
    ]
    shapes = [each.shape for each in report.comparisons if each.output == output_names[0]]
    assert shapes[0] == shapes[1] != shapes[2] == shapes[3]
    assert (shapes[0][0], shapes[2][0]) == (2, 1)
    if len(shapes[0]) == 3:
        assert (shapes[0][1], shapes[2][1]) == (17, 8)
        if dtype is torch.float32:
            assert {each.same_argmax for each in report.comparisons} == {1.0}
    assert max(each.max_rel for each in report.comparisons) < BOUND[dtype]
    assert set(report.merged) == set(slcompile.factors(model))
    assert report.absent == ()

    # The file: ordinary, with the merged weights under their names.
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    assert {each.domain for each in proto.opset_import} == {""}
    assert {each.domain for each in proto.graph.node} == {""}
    assert not proto.functions
    stored = initializers(report.path)
    merged = slcompile.merged_state_dict(model)
    for key in report.merged:
        np.testing.assert_array_equal(stored[key], merged[key].to(dtype).numpy(), err_msg=key)
    for key in set(merged) & set(stored) - set(report.merged):
        wanted = merged[key].to(dtype) if merged[key].is_floating_point() else merged[key]
        np.testing.assert_array_equal(stored[key], wanted.numpy(), err_msg=key)
    assert not [key for key in stored if "_sl" in key or "onnx::" in key]

    # In onnxruntime, at a third shape.
    session = onnxruntime.InferenceSession(report.path)
    inputs = make_inputs(3, 11)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    feeds = {key: (value.to(dtype) if value.is_floating_point() else value).numpy() for key, value in tensors.items()}
    got = dict(zip(output_names, session.run(None, feeds), strict=True))
    with torch.no_grad():
        wanted = model.eval()(**inputs)
    model.train()
    for key in output_names:
        largest = wanted[key].abs().max().item()
        assert np.abs(got[key] - wanted[key].numpy()).max() < BOUND[dtype] * largest, key

    # The model is what it was.
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(each.training for each in model.modules())
    assert not [each for each in model.modules() if "forward" in vars(each)]
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]

    # Names, of inputs, outputs and axes.
    assert tuple(each.name for each in session.get_outputs()) == output_names
    assert tuple(each.name for each in session.get_inputs()) == input_names
    for given in session.get_inputs():
        assert given.shape[0] == "batch_size", given.name
        assert given.name == "pixel_values" or given.shape[1] == "sequence_length", given.name


@pytest.mark.slow
@pytest.mark.parametrize("tied", some_of([True, False], [True]))
def test_a_head_tied_to_the_embedding_is_stored_once(tied, tmp_path):
    inputs = causal(2, 17)
    model = trained(tiny("llama", tie_word_embeddings=tied), inputs)
    report = slcompile.export_onnx(model, (), tmp_path / "model.onnx", kwargs=inputs)
    heads = {"model.embed_tokens.weight", "lm_head.weight"} & set(initializers(report.path))
    assert len(heads) == (1 if tied else 2)
    assert report.max_rel < BOUND[torch.float32]


@pytest.mark.slow
def test_factorized_weights_that_are_tied_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.second(torch.tanh(self.first(x)))}

    model = trained(Tied(), {"x": torch.randn(4, 64)})
    report = slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "model.onnx")
    stored = initializers(report.path)
    assert [value.shape for value in stored.values()].count((64, 64)) == 1
    (name,) = {"first.weight", "second.weight"} & set(stored)
    np.testing.assert_array_equal(stored[name], slcompile.merged_state_dict(model)[name].numpy())
    assert report.max_rel < BOUND[torch.float32]
    assert report.absent == ()
