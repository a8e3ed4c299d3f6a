"""What the converter for torchtitan does by itself, with stand-ins for torchtitan's classes where it is not installed.

``test_torchtitan.py`` builds, shards and trains with torchtitan's own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import slcompile
from tests.testing import EXAMPLES, module_at


class Module(nn.Module):
    """torchtitan's protocol: states are drawn by ``init_states``."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


class ModelConfigConverter:
    """As in torchtitan 0.3.0."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


@pytest.fixture
def titan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    names = (
        "components.checkpoint components.loss components.metrics components.optimizer config trainer "
        "hf_datasets.text_datasets models.common models.common.config_utils models.llama3 models.llama3.model "
        "protocols.model protocols.model_spec protocols.module"
    )
    for name in names.split():
        parts = name.split(".")
        for depth in range(len(parts) + 1):
            path = ".".join(["torchtitan", *parts[:depth]])
            monkeypatch.setitem(sys.modules, path, MagicMock(name=path))
    sys.modules["torchtitan.protocols.module"].Module = Module
    sys.modules["torchtitan.protocols.model"].ModelConfigConverter = ModelConfigConverter
    return module_at(EXAMPLES / "torchtitan" / "sltrain.py", "sltrain_of_stand_ins")


@dataclass(kw_only=True)
class Config(Module.Config):
    """Of a model, which torchtitan builds from it."""

    width: int = 64
    updated: list[Any] = field(default_factory=list)

    def build(self, **kwargs: Any) -> nn.Module:
        class Model(Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.layers = nn.ModuleDict({str(index): nn.Linear(width, width) for index in range(2)})

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers.values():
                    x = layer(x)
                return x

        return Model(self.width)

    def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
        self.updated.append(config)


def job(degree: int = 1, backend: str = "partial_dtensor") -> Any:
    return SimpleNamespace(parallelism=SimpleNamespace(tensor_parallel_degree=degree, spmd_backend=backend))


def test_a_configuration_builds_a_factorized_model_on_the_meta_device(titan):
    converter = titan.SLTrainConverter(titan.SLTrainConverter.Config(rank=8, density=0.05, seed=3))
    config = converter.convert(Config(width=96))
    assert isinstance(config, Config)
    with torch.device("meta"):
        model = config.build()
    weights = [each for each in model.modules() if isinstance(each, slcompile.SLWeight)]
    assert [(each.shape, each.rank, each.density) for each in weights] == 2 * [((96, 96), 8, 0.05)]
    assert all(isinstance(each, Module) for each in weights)  # else torchtitan's check of the protocol refuses them
    assert all(each.is_meta for each in model.parameters())
    seeds = {each.drawn_seed for each in weights}
    assert seeds == {each.drawn_seed for each in config.build().modules() if isinstance(each, slcompile.SLWeight)}


def test_tensor_parallelism_and_another_backend_are_refused(titan):
    config = titan.SLTrainConverter(titan.SLTrainConverter.Config()).convert(Config())
    config.update_from_config(config=job())
    assert len(config.updated) == 1
    for refused in (job(degree=2), job(backend="spmd_types")):
        with pytest.raises(ValueError, match=r"need parallelism\.tensor_parallel_degree=1 and spmd_backend"):
            config.update_from_config(config=refused)
    assert len(config.updated) == 1


def test_layers_are_compiled_by_sltrain_and_the_rest_of_the_job_is_torchtitans(titan, monkeypatch):
    @dataclass
    class CompileConfig:
        enable: bool = True
        components: list[str] = field(default_factory=lambda: ["model", "loss"])

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Linear, "compile", lambda self, **kwargs: calls.append(kwargs))
    found: list[Any] = []

    def parallelize(model: nn.Module, *, compile_config: CompileConfig, **kwargs: Any) -> nn.Module:
        found.append((compile_config.components, kwargs))
        return model

    model = Config().build()
    assert titan.compiled(parallelize)(model, compile_config=CompileConfig(), dump_folder="out") is model
    assert calls == 2 * [{"backend": "sltrain", "fullgraph": True}]
    titan.compiled(parallelize)(model, compile_config=CompileConfig(enable=False))
    assert len(calls) == 2
    assert found == [(["loss"], {"dump_folder": "out"}), (["model", "loss"], {})]
