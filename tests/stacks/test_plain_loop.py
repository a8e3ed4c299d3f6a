"""A loop of one's own: autocast, GradScaler, accumulation, EMA, torch.compile's modes, Inductor's own settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.graph
import torch.nn.functional as F

import slcompile
from tests.testing import some_of

pytestmark = pytest.mark.slow

OPTIONS = {"rank": 8, "density": 0.05, "seed": 3}


@pytest.mark.parametrize("dtype", some_of([torch.bfloat16, torch.float16], [torch.float16]), ids=str)
def test_autocast_scaler_accumulation_and_ema_are_those_of_eager(block_class, batch, light, dtype):
    """The whole recipe, by the string, against the same loop over an eager model that was factorized before."""

    def run(compiled: bool):
        torch.manual_seed(0)
        model = block_class()
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # mended, or of what is replaced below
        called = torch.compile(model, backend="sltrain", options=light)
        if not compiled:
            called = slcompile.factorize_(model, config, example_args=(batch[0],))
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ema, losses = None, []
        for _ in range(3):
            for inputs, labels in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
                with torch.autocast("cpu", dtype):
                    loss = F.cross_entropy(called(inputs), labels) / 2
                scaler.scale(loss).backward()
                losses.append(loss.item())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema is None:  # a copy of the model, so after its conversion
                ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
            ema.update_parameters(model)
        return model, ema.module, losses

    config = slcompile.SLConfig.from_options(light)[0]
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    model, average, losses = run(compiled=True)
    eager, eager_average, expected = run(compiled=False)
    assert list(slcompile.factors(model)) == ["mix", "up.weight", "down.weight"]
    assert losses == pytest.approx(expected, rel=2e-2 if dtype is torch.bfloat16 else 3e-3)
    assert sum(losses[-2:]) < sum(losses[:2])
    with torch.no_grad():
        # What it learned, and the average of it, lie as far from the start as eager's: low precision apart.
        for one, other in ((model, eager), (average, eager_average)):
            assert torch.equal(one.up.weight_sl.seed, other.up.weight_sl.seed)
            difference = (one(batch[0]) - other(batch[0])).norm() / other(batch[0]).norm()
            assert difference < 0.05
        assert not torch.equal(average.up.weight, model.up.weight)
    merged = slcompile.merged_state_dict(average)  # an average of factors merges like any model
    block_class().load_state_dict(merged)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """Inductor's settings as they are when it makes the code of each graph."""
    settings: list[dict] = []
    original = torch._inductor.graph.GraphLowering.codegen

    def codegen(self):
        settings.append(torch._inductor.config.get_config_copy())
        return original(self)

    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "codegen", codegen)
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield settings


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_sets_inductor_and_trains_as_eager_does(block_class, batch, mode, seen):
    model = slcompile.factorize_(block_class(), slcompile.SLConfig(**OPTIONS))
    expected = F.cross_entropy(model(batch[0]), batch[1])
    loss = F.cross_entropy(torch.compile(model, backend="sltrain", mode=mode)(batch[0]), batch[1])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, value in torch._inductor.list_mode_options(mode).items():
        assert all(each[name] == value for each in seen), name
    assert len(seen) == 2  # forward and backward


def test_inductor_settings_beside_ours_reach_forward_and_backward(block, batch, seen):
    inductor = {"max-autotune": True, "epilogue_fusion": False}
    compiled = torch.compile(block, backend="sltrain", options={**OPTIONS, "inductor": inductor})
    compiled(batch[0]).sum().backward()
    assert len(slcompile.factors(block)) == 3
    assert len(seen) == 2
    assert all(each["max_autotune"] and not each["epilogue_fusion"] for each in seen)
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(block, backend="sltrain", mode="max-autotune", options=OPTIONS)
