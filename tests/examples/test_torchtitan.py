"""The converter for torchtitan: what of it runs without a GPU, which torchtitan's Trainer needs."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import slcompile
from slcompile.memory.estimate import held_memory
from slcompile.models import known_config
from slcompile.names import SUFFIX
from tests.testing import EXAMPLES, module_at, process_group

pytestmark = pytest.mark.slow

for needed in ("torchtitan", "tensorboard", "datasets"):
    pytest.importorskip(needed, reason="needs torchtitan 0.3.0 (docs/stack.md)")


@pytest.fixture(scope="module")
def titan() -> ModuleType:
    return module_at(EXAMPLES / "torchtitan" / "sltrain.py", "sltrain_of_torchtitan")


def small(titan: ModuleType, **options: Any) -> Any:
    """The job of 7B with a model of two narrow layers, and attention that runs on CPU."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    titan.LLAMAS["tiny"] = (64, 96, 2, 4)
    try:
        job = titan.job("tiny", rate=1e-2, batch=2, rank=8, density=0.05)
    finally:
        del titan.LLAMAS["tiny"]
    for layer in job.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    job.training.seq_len = 32
    return replace(job, **options)


def test_it_is_built_sharded_compiled_and_trained_as_torchtitans_trainer_does(
    titan, tmp_path, aten_kernels, monkeypatch
):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.distributed import ParallelDims

    monkeypatch.setattr("torchtitan.distributed.parallel_dims.device_type", "cpu")  # which it takes for "cuda"
    job = small(titan)
    job.model_spec.model.update_from_config(config=job)
    with process_group(tmp_path):
        parallel = ParallelDims.from_config(job.parallelism, world_size=1)
        torch.manual_seed(0)
        with torch.device("meta"):
            model = job.model_spec.model.build()
        model.verify_module_protocol()
        assert len(slcompile.factors(model)) == 2 * 7
        model = job.model_spec.parallelize_fn(
            model,
            parallel_dims=parallel,
            training=job.training,
            parallelism=job.parallelism,
            compile_config=job.compile,
            ac_config=None,
            dump_folder=str(tmp_path),
        )
        assert all(isinstance(layer, FSDPModule) for layer in model.layers.values())
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_states()
        for module in model.modules():
            if isinstance(module, slcompile.SLWeight):
                module.check_support()
                assert 0 < float(module.A.full_tensor().detach().std()) < 1
                assert not module.B.full_tensor().any()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(32000, (2, 33))
        losses = []
        for _ in range(4):
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1
        assert slcompile.last_report() is not None
        names = [name for name in get_model_state_dict(model) if "layers.1.feed_forward.w2" in name]
        assert names == [
            f"layers.1.feed_forward.w2.weight{SUFFIX}.{part}" for part in ("B", "A", "values", "seed", "rows_of_block")
        ]


def test_what_it_cannot_do_is_refused(titan):
    for change in ({"tensor_parallel_degree": 2}, {"spmd_backend": "spmd_types"}):
        job = small(titan)
        job = replace(job, parallelism=replace(job.parallelism, **change))
        with pytest.raises(ValueError, match=r"need parallelism\.tensor_parallel_degree=1 and spmd_backend"):
            job.model_spec.model.update_from_config(config=job)


@pytest.mark.parametrize(("name", "rank", "density"), [("llama_1b", 512, 0.03), ("llama_7b", 1024, 0.05)])
def test_the_jobs_are_the_papers_models(titan, name, rank, density):
    with torch.device("meta"):
        model = getattr(titan, name)().model_spec.model.build()
    config = slcompile.SLConfig(rank=rank, density=density)
    transformers = held_memory(known_config(name.replace("_", "-")), config=config)["sltrain"]
    assert sum(each.numel() for each in model.parameters()) == transformers.parameter_count
