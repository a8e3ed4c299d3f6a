from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slcompile
import slcompile.backend
from slcompile.ops import WEIGHT_OPS
from tests.testing import LITE, OPTIONS, saved_for_backward

WEIGHTS = {"up.weight", "down.weight", "mix"}


without_code = pytest.mark.usefixtures("aten_kernels")


def train(model, batch, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def is_converted(model: nn.Module) -> bool:
    return bool(slcompile.factors(model))


@pytest.mark.slow
def test_the_string_alone_trains_without_an_import_of_slcompile(tmp_path):
    script = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
assert "slcompile" not in sys.modules
compiled = torch.compile(model, backend="sltrain", options={"rank": 8})
x = torch.randn(32, 64)
losses = []
for _ in range(8):
    loss = (compiled(x) - x).square().mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(sorted(model.state_dict()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'0.weight_sl.B'" in done.stdout
    assert "factorized 2 weights of Sequential" in done.stderr


def test_modules_that_the_garbage_collector_hides_are_said(block, batch, caplog, aten_kernels):
    gc.freeze()
    torch.compile(block, backend="sltrain", options=OPTIONS)(batch[0])
    assert "3 weights of a graph stay dense: no module holds it as a parameter" in caplog.text
    assert "gc.freeze() hides modules. Call it after the first training step" in caplog.text


@pytest.mark.slow
def test_first_run_converts_with_one_additional_compile_and_frees_the_dense_weights(block, batch, counting):
    dense = [weakref.ref(block.get_parameter(name)) for name in WEIGHTS]
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    compiled = torch.compile(block, backend=counting, options=OPTIONS)
    loss = F.cross_entropy(compiled(batch[0]), batch[1])
    assert [reference() for reference in dense] == [None] * 3  # before the backward pass already
    loss.backward()
    optimizer.step()
    losses = train(compiled, batch, optimizer, 4)
    assert losses[-1] < loss.item()
    assert counting.calls == 2
    assert set(slcompile.factors(block)) == WEIGHTS
    report = slcompile.last_report()
    assert {each.name for each in report.replaced} == WEIGHTS
    assert [(each.name, each.reason) for each in report.left] == [("head.weight", "too_small")]


@without_code
def test_the_first_step_saves_no_more_for_backward_than_later_ones(block, batch):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    sizes = []
    for _ in range(3):
        loss, saved = saved_for_backward(lambda: F.cross_entropy(compiled(batch[0]), batch[1]))
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in saved))
        loss.backward()
    assert sizes[0] <= sizes[1] == sizes[2]


@pytest.mark.slow
@without_code
def test_a_second_instance_converts_through_the_same_compiled_graph(block_class, batch, counting):
    first, second = block_class(), block_class()
    for model in (first, second):
        compiled = torch.compile(model, backend=counting, options=OPTIONS)
        train(compiled, batch, torch.optim.AdamW(model.parameters(), lr=1e-2), 3)
        assert set(slcompile.factors(model)) == WEIGHTS
    assert counting.calls == 2
    assert slcompile.factors(first)["up.weight"].seed != slcompile.factors(second)["up.weight"].seed


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_converted_without_gradients(block, batch, mode):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    with mode():
        torch.testing.assert_close(compiled(batch[0]), block(batch[0]))
    assert not is_converted(block)


@pytest.mark.slow
@without_code
def test_eval_mode_and_frozen_weights_stay_dense_and_training_converts_later(block, batch, counting):
    block.down.weight.requires_grad_(False)
    block.eval()
    compiled = torch.compile(block, backend=counting, options=OPTIONS)
    torch.testing.assert_close(compiled(batch[0]), block(batch[0]))
    assert not is_converted(block)
    block.train()
    block.up.eval()
    compiled(batch[0]).sum().backward()  # Dynamo does not guard on `training`: the same graph, another variant of it
    assert set(slcompile.factors(block)) == {"mix"}
    assert block.mix_sl.B.grad is not None
    reasons = {each.name: each.reason for each in slcompile.last_report().left}
    assert reasons == {"up.weight": "eval", "down.weight": "frozen", "head.weight": "too_small"}
    assert counting.calls == 1
    block.up.train()
    block.zero_grad()
    compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight", "mix"}


@without_code
def test_an_instance_in_eval_mode_runs_dense_through_a_graph_that_converts(block_class, batch, counting):
    trained, other = block_class(), block_class().eval()
    torch.compile(trained, backend=counting, options=OPTIONS)(batch[0])
    torch.testing.assert_close(torch.compile(other, backend=counting, options=OPTIONS)(batch[0]), other(batch[0]))
    assert is_converted(trained)
    assert not is_converted(other)
    assert counting.calls == 1


@without_code
def test_converting_is_announced_once_per_model(block, batch, caplog):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    with caplog.at_level(logging.WARNING, "slcompile"):
        for _ in range(3):
            compiled(batch[0])
    (record,) = caplog.records
    assert "factorized 3 weights of Block (1 left dense)" in record.getMessage()
    assert "init kaiming, which replaces the weights" in record.getMessage()


@without_code
def test_a_model_without_eligible_weights_is_warned_about_once(caplog):
    model = nn.Linear(8, 8)
    compiled = torch.compile(model, backend="sltrain")
    with caplog.at_level(logging.WARNING, "slcompile"):
        for batch in (4, 5, 6):
            compiled(torch.randn(batch, 8)).sum().backward()
    (record,) = caplog.records
    assert "no weight of Linear was factorized" in record.getMessage()
    assert "too_small" in record.getMessage()


def composed_like(model: nn.Module) -> set[tuple[int, ...]]:
    shapes = {w.shape for w in model.modules() if isinstance(w, slcompile.SLWeight)}
    return shapes | {shape[::-1] for shape in shapes}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_no_composed_weight_is_saved_for_backward(request, batch, autocast, checkpointed):
    model = request.getfixturevalue("checkpointed_block" if checkpointed else "block")
    graphs: list[torch.fx.Graph] = []
    options = {
        **OPTIONS,
        "lowering": "composed",
        "inductor": {**LITE["inductor"], "post_grad_custom_pre_pass": GraphCollector(graphs), "fx_graph_cache": False},
    }
    compiled = torch.compile(model, backend="sltrain", options=options)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(compiled(batch[0]), batch[1])

    for _ in range(2):
        graphs.clear()
        loss, saved = saved_for_backward(run)
        loss.backward()
        forward, backward = graphs
        shapes = composed_like(model)
        assert len(shapes) == 3
        (output,) = [node for node in forward.nodes if node.op == "output"]
        for node in output.all_input_nodes:
            assert tuple(node.meta["val"].shape) not in shapes, node.format_node()
        assert not [tensor.shape for tensor in saved if tuple(tensor.shape) in shapes]
        # It is composed again in the backward pass: for the input gradient of each but the first layer, at least.
        assert sum(node.target in WEIGHT_OPS for node in backward.nodes) >= 2
        assert sum(node.target in WEIGHT_OPS for node in forward.nodes) == 3


class GraphCollector(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, graphs: list[torch.fx.Graph]) -> None:
        self.graphs = graphs

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(torch.fx.Graph())
        self.graphs[-1].output(self.graphs[-1].graph_copy(graph, {}))

    def uuid(self) -> None:
        return None


def test_the_first_call_already_computes_with_the_factors(block, batch):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    loss = F.cross_entropy(compiled(batch[0]), batch[1])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    eager = F.cross_entropy(block(batch[0]), batch[1])
    eager.backward()
    torch.testing.assert_close(loss, eager)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@without_code
def test_weights_shared_by_two_modules_become_one_factorization(batch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Shared()
    torch.compile(model, backend="sltrain", options=OPTIONS)(batch[0]).sum().backward()
    assert model.first.weight_sl is model.second.weight_sl
    assert len(list(model.parameters())) == 5
    slcompile.merge_(model)
    assert model.first.weight is model.second.weight


@without_code
def test_tied_embedding_is_left_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(100, 64)
            self.layer = nn.Linear(64, 64)
            self.out = nn.Linear(64, 100, bias=False)
            self.out.weight = self.table.weight

        def forward(self, tokens):
            return self.out(self.layer(self.table(tokens)))

    model = Tied()
    torch.compile(model, backend="sltrain", options=OPTIONS)(torch.randint(100, (2, 7))).sum().backward()
    assert set(slcompile.factors(model)) == {"layer.weight"}
    assert {each.name: each.reason for each in slcompile.last_report().left} == {"table.weight": "tied"}


@without_code
def test_a_weight_that_no_module_owns_is_left_dense(batch):
    weights = [nn.Parameter(torch.randn(64, 64))]

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) @ weights[0]

    model = Listed()
    torch.compile(model, backend="sltrain", options=OPTIONS)(batch[0]).sum().backward()
    assert set(slcompile.factors(model)) == {"layer.weight"}
    (left,) = slcompile.last_report().left
    assert left.reason == "not_owned"
    assert weights[0].grad is not None


@pytest.mark.slow
@without_code
def test_graph_breaks_convert_each_fragment(batch):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.first, self.second, self.out = (
                nn.Linear(*each) for each in ((9, 64), (64, 64), (64, 64), (64, 9))
            )

        def forward(self, x):
            x = self.into(x)
            torch._dynamo.graph_break()
            x = self.first(x)
            torch._dynamo.graph_break()
            x = self.second(x)
            torch._dynamo.graph_break()
            return self.out(x)

    model = Broken()
    compiled = torch.compile(model, backend="sltrain", options=OPTIONS)
    compiled(batch[0][:, :9]).sum().backward()
    assert set(slcompile.factors(model)) == {"first.weight", "second.weight"}
    assert all(p.grad is not None for p in model.parameters())
    # What graphs without anything to convert leave is reported too, before the first conversion and after it.
    reasons = {each.name: each.reason for each in slcompile.last_report().left}
    assert reasons == {"into.weight": "too_small", "out.weight": "too_small"}


@without_code
def test_an_explicitly_factorized_model_is_left_as_it_is(block, batch):
    slcompile.factorize_(block, slcompile.SLConfig(rank=4, include=("up*",)))
    torch.compile(block, backend="sltrain")(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight"}
    assert slcompile.factors(block)["up.weight"].B.shape == (96, 4)


@pytest.mark.slow
@without_code
def test_patterns_are_matched_with_the_names_of_dense_weights_also_after_conversion(block, batch, counting):
    compiled = torch.compile(block, backend=counting, options={**OPTIONS, "include": ("up.weight",)})
    for _ in range(2):
        compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight"}
    assert counting.calls == 2
    reasons = {each.name: each.reason for each in slcompile.last_report().left}
    assert reasons == {"down.weight": "excluded", "mix": "excluded", "head.weight": "too_small"}


@pytest.mark.slow
def test_the_users_own_joint_pass_runs_too(block, batch):
    graphs: list[torch.fx.Graph] = []
    inductor = {"joint_custom_pre_pass": GraphCollector(graphs), "fx_graph_cache": False}
    torch.compile(block, backend="sltrain", options={**OPTIONS, "inductor": inductor})(batch[0]).sum().backward()
    assert any(node.target in WEIGHT_OPS for node in graphs[0].nodes)


@pytest.mark.slow
def test_modes_and_inductor_settings_reach_inductor(block, block_class, batch):
    # "max-autotune-no-cudagraphs" is accepted on the CPU; a bad name must not be.
    torch.compile(block, backend="sltrain", mode="max-autotune-no-cudagraphs")(batch[0]).sum().backward()
    assert is_converted(block)
    for kwargs, message in (
        ({"mode": "max-autotun"}, "did you mean 'max-autotune'"),
        ({"options": {"inductor": {"max_autotun": True}}}, "did you mean 'max_autotune'"),
        ({"options": {"inductor": {"use_joint_graph_passes": False}}}, "use_joint_graph_passes .* must be True"),
        ({"options": {"rnk": 3}}, "did you mean 'rank'"),
        ({"options": {"rank": float("nan")}}, "rank must be"),
        ({"options": {"exclude": ["*nothing*"]}}, "matches no parameter"),
        ({"options": {"rank": 1000}}, "rank must be at most"),
    ):
        torch._dynamo.reset()
        model = block_class()
        with pytest.raises(Exception, match=message):
            torch.compile(model, backend="sltrain", **kwargs)(batch[0])
        assert not is_converted(model)


@pytest.mark.slow
def test_our_passes_run_in_inductors_lite_mode_too(block, batch):
    compiled = torch.compile(block, backend="sltrain", mode="lite")
    compiled(batch[0]).sum().backward()
    loss, saved = saved_for_backward(lambda: compiled(batch[0]).sum())
    loss.backward()
    assert len(saved) > 3
    assert not [tensor.shape for tensor in saved if tuple(tensor.shape) in composed_like(block)]


def test_attention_reads_factored_products_right_in_lite_mode():
    """Its CPU kernel wants adjacent channels and does not look; a factored product comes transposed."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (each(x).view(1, 16, 4, 16).transpose(1, 2) for each in (self.q, self.k))
            return F.scaled_dot_product_attention(q, k, k)

    model = slcompile.factorize_(Attention(), slcompile.SLConfig(init="spectral"))
    x = torch.randn(1, 16, 64)
    compiled = torch.compile(model, backend="sltrain", options={"lowering": "factored", **LITE})
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@without_code
def test_no_step_leaks_memory_or_compiles(block, batch, counting):
    compiled = torch.compile(block, backend=counting, options=OPTIONS)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    train(compiled, batch, optimizer, 5)
    gc.collect()
    before = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    train(compiled, batch, optimizer, 50)
    gc.collect()
    assert sum(isinstance(thing, Tensor) for thing in gc.get_objects()) <= before
    assert counting.calls == 2


@without_code
def test_a_dry_run_reports_and_trains_dense(block, batch, caplog):
    compiled = torch.compile(block, backend="sltrain", options={**OPTIONS, "dryrun": True})
    with caplog.at_level(logging.WARNING, "slcompile"):
        losses = train(compiled, batch, torch.optim.AdamW(block.parameters(), lr=1e-2), 3)
    assert losses[-1] < losses[0]
    assert not is_converted(block)
    (record,) = [each for each in caplog.records if each.name == "slcompile"]
    assert "dry run, nothing of Block is changed" in record.getMessage()
    report = slcompile.last_report()
    assert {each.name for each in report.replaced} == WEIGHTS
    assert [(each.name, each.reason) for each in report.left] == [("head.weight", "too_small")]
    torch._dynamo.reset()
    torch.compile(block, backend="sltrain", options=OPTIONS)(batch[0]).sum().backward()
    assert is_converted(block)


@without_code
def test_who_owns_the_weights_is_looked_up_once_not_once_for_each(batch, monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    find, calls = slcompile.weight.owners.LiveObjects.find, []
    monkeypatch.setattr(slcompile.weight.owners.LiveObjects, "find", lambda: calls.append(None) or find())
    torch.compile(model, backend="sltrain", options=OPTIONS)(batch[0])
    assert len(calls) <= 4


@pytest.mark.slow
def test_the_converted_model_finds_what_was_compiled_for_its_conversion(block, batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters  # read anew each time: torch may clear it when it first compiles
    counters.clear()
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    for expected in (0, 2):  # forward and backward
        compiled(batch[0]).sum().backward()
        assert counters["inductor"]["fxgraph_cache_hit"] == expected
    assert counters["inductor"]["fxgraph_cache_miss"] == 2
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0
