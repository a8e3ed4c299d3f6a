from __future__ import annotations

import copy
import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile import SLConfig, explain, torch_private
from slcompile.ops import vector_cpu
from slcompile.passes import joint_passes
from slcompile.passes.graph import pass_name

CONFIG = SLConfig(rank=8, density=0.05, lowering="composed")


def test_a_model_is_explained_without_being_changed(block, batch):
    block.up.weight.grad = torch.ones_like(block.up.weight)
    before, random = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    found = explain(block, (batch[0],), config=CONFIG)
    assert [(row.name, row.decision, row.reason, row.tokens) for row in found.matmuls] == [
        ("up.weight", "replaced", "", 32),
        ("down.weight", "replaced", "", 32),
        ("mix", "replaced", "", 32),
        ("head.weight", "left", "too_small", 32),
    ]
    up = found.matmuls[0]
    assert (up.shape, up.rank, up.nonzeros, up.lowering) == ((96, 64), 8, 96 * 3, "composed")
    assert "self.up(x)" in up.source
    assert set(up.costs) == {"composed", "factored"}
    assert [each.name for each in found.graphs] == [
        f"graph 0, {x}" for x in ("captured", "joint", "forward", "backward")
    ]
    (node,) = [node for node in found.graphs[0].before if node.id == up.node]
    assert (node.target, node.module) == ("torch._C._nn.linear", (("up", "Linear"),))
    assert not slcompile.factors(block)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(block.up.weight.grad, torch.ones_like(block.up.weight))
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_is_compiled_for_it(block, batch, monkeypatch):
    """Not even in a thread, whose compiler would run on when a short command has ended."""
    calls = []
    monkeypatch.setattr(torch_private, "cpp_library", calls.append)
    for each in (vector_cpu._library, vector_cpu._begin_compiling):
        each.cache_clear()
    explain(block, (batch[0],), config=SLConfig(rank=8, density=0.05, lowering="factored"))
    for thread in threading.enumerate():
        if thread.name == "slcompile vector.cpp":
            thread.join()
    assert calls == []


def test_no_weight_is_kept_after_it(block, batch):
    held = weakref.ref(block.up.weight)
    found = explain(block, (batch[0],), config=CONFIG)
    slcompile.factorize_(block, CONFIG)
    gc.collect()
    assert held() is None
    assert found.summary.total == len(found.matmuls) == 4


def test_sizes_are_those_of_the_arguments_whatever_was_explained_before(batch):
    for tokens, width in ((6, 32), (10, 48), (14, 64)):
        found = explain(nn.Sequential(nn.Linear(width, 64)), (torch.randn(tokens, width),), config=CONFIG)
        assert [row.tokens for row in found.matmuls] == [tokens]


@pytest.mark.slow
def test_the_totals_are_those_of_the_converted_model(block, batch):
    found = explain(block, (batch[0],), config=CONFIG)
    assert found.summary.parameters.before == sum(each.numel() for each in block.parameters())
    assert found.summary.bytes.before == 16 * found.summary.parameters.before
    # x needs no gradient: the first product has 2 parts of 3. T = 32.
    sizes = {"up": (96 * 64, 2), "down": (64 * 96, 3), "mix": (64 * 64, 3), "head": (5 * 64, 3)}
    assert found.summary.flops.before == sum(2 * 32 * size * products for size, products in sizes.values())
    # Composed adds 2nkr for each composition (up is composed once only) and 4nkr for the projections; r = 8.
    added = sum(
        (products - 1) * 2 * size * 8 + 4 * size * 8 for name, (size, products) in sizes.items() if name != "head"
    )
    assert found.summary.flops.after == found.summary.flops.before + added
    slcompile.factorize_(block, CONFIG, example_args=(batch[0],))
    again = explain(block, (batch[0],), config=CONFIG)
    assert found.summary.parameters.after == sum(each.numel() for each in block.parameters())
    assert again.summary == found.summary  # what is replaced already counts as what would be


def test_factored_matmuls_cost_what_the_design_says(block, batch):
    found = explain(block, (batch[0],), config=SLConfig(rank=8, density=0.05, lowering="factored"))
    down = found.matmuls[1]
    assert down.lowering == "factored"
    assert down.flops.before == 6 * 32 * 64 * 96
    assert down.flops.after == 6 * 32 * (8 * (64 + 96) + down.nonzeros)


def test_passes_show_what_they_changed(block, batch):
    found = explain(block, (batch[0],), config=CONFIG)
    names = [(row.stage, row.name, row.changed) for row in found.passes]
    changed = ("fuse_weight_grads", "recompute_weights")
    assert names == [
        ("captured", "parameterize_weights", True),
        *(("joint", name, name in changed) for name in map(pass_name, joint_passes(CONFIG))),
        ("forward", "lower_ops", False),
        ("forward", "read_transposed", False),
        ("backward", "lower_ops", True),
        ("backward", "read_transposed", False),
    ]
    first = found.passes[0]
    assert (first.created, first.erased, first.replaced, first.left) == (15, 3, 3, 0)
    assert "- up.weight = placeholder()  # [96, 64] float32" in first.diff.splitlines()
    assert "+ up.weight_sl.B = placeholder()  # [96, 8] float32" in first.diff.splitlines()
    recomputing = next(row for row in found.passes if row.name == "recompute_weights")
    tagged = [line for line in recomputing.diff.splitlines() if line.endswith("must_recompute")]
    assert sum("slcompile.compose.default(" in line for line in tagged) == 3


def test_the_captured_graph_keeps_what_reads_a_replaced_weight(block, batch):
    captured = explain(block, (batch[0],), config=CONFIG).graphs[0]
    assert captured.counts == {"kept": 11, "removed": 0, "new": 12, "rewritten": 3}
    rewritten = [(node.target, node.origins) for node in captured.after if node.status == "rewritten"]
    assert [target for target, _ in rewritten] == ["slcompile.compose.default"] * 3
    weights = {node.id: node.weight for node in captured.before if node.status == "rewritten"}
    assert {weights[origin] for _, (origin,) in rewritten} == {"up.weight", "down.weight", "mix"}


def test_the_joint_graph_leads_from_factored_products_to_dense_ones(block, batch):
    joint = explain(block, (batch[0],), config=SLConfig(rank=8, density=0.05, lowering="factored")).graphs[1]
    before = {node.id: node for node in joint.before}
    origins = [before[each].target for node in joint.after if node.status == "rewritten" for each in node.origins]
    assert origins.count("aten.mm.default") + origins.count("aten.addmm.default") >= 3
    assert {node.status for node in joint.before} == {"kept", "removed", "rewritten"}


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.BatchNorm1d(64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.first(x))
        torch._dynamo.graph_break()
        x.add_(1)
        return self.second(x)


@pytest.mark.slow
def test_every_part_of_a_broken_model_is_shown_with_the_reason(batch):
    model = Broken()
    found = explain(model, (batch[0],), config=CONFIG)
    assert [(row.name, row.graph, row.reason) for row in found.matmuls] == [
        ("first.weight", 0, ""),
        ("second.weight", 1, ""),
        ("unused.weight", None, "not_captured"),
    ]
    (only,) = found.breaks
    assert "graph_break" in only.reason
    assert only.source.startswith("test_explain.py:")
    assert "torch._dynamo.graph_break()" in only.source
    # The second part needs the gradient of its input, as it would in training.
    assert found.matmuls[1].flops.before == 6 * 32 * 64 * 64
    assert model.calls == 0
    assert int(model.norm.num_batches_tracked) == 0
    assert "Graph breaks (2 graphs)" in str(found)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.below, self.unused = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.below(self.own(x))


class Disabled(Inner):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class DisabledHelper(Inner):
    @torch.compiler.disable
    def helper(self, x: Tensor) -> Tensor:
        return self.own(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.below(self.helper(x))


class Looped(Inner):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.below(self.own(x))
            torch._dynamo.graph_break()
        return x


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(64, 64), inner, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


DISABLED = "Skip inlining `torch.compiler.disable()`d function"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "own", "below", "detail", "broken"),
    [
        (Disabled, "disabled", "disabled", "Disabled.forward is under torch.compiler.disable()", DISABLED),
        (
            lambda: torch.compiler.disable(Inner()),
            "disabled",
            "disabled",
            "Inner is under torch.compiler.disable()",
            "Unsupported function call",
        ),
        (DisabledHelper, "disabled", "", "DisabledHelper.helper is under torch.compiler.disable()", DISABLED),
        (
            Looped,
            "graph_break",
            "graph_break",
            "Dynamo skips Looped.forward: Call to `torch._dynamo.graph_break()`, at test_explain.py:",
            "Call to `torch._dynamo.graph_break()`",
        ),
    ],
)
def test_what_no_graph_reads_has_the_reason(batch, inner, own, below, detail, broken):
    found = explain(Outer(inner()), (batch[0],), config=CONFIG)
    rows = {row.name: row for row in found.matmuls}
    assert (rows["first.weight"].reason, rows["last.weight"].reason) == ("", "")
    assert rows["first.weight"].graph != rows["last.weight"].graph
    assert (rows["inner.own.weight"].reason, rows["inner.below.0.weight"].reason) == (own, below)
    assert rows["inner.own.weight"].detail.startswith(detail)
    assert [each.reason.startswith(broken) for each in found.breaks] == [True]
    assert rows["inner.own.weight"].decision == "left"


def test_convolutions_that_are_no_matmuls_have_the_reason():
    layers = nn.Conv1d(32, 32, 3, groups=2), nn.ConvTranspose1d(32, 32, 3), nn.Conv1d(32, 64, 3)
    result = explain(nn.Sequential(*layers), (torch.randn(2, 32, 16),), config=CONFIG)
    found = {row.name: (row.decision, row.reason, row.detail.partition(",")[0]) for row in result.matmuls}
    assert found.pop("2.weight")[0] == "replaced"
    assert found == {
        "0.weight": ("left", "no_matmul", "read by a convolution of 2 groups"),
        "1.weight": ("left", "no_matmul", "read by a transposed convolution"),
    }


def test_a_model_that_dynamo_skips_as_a_whole_says_why(batch):
    found = explain(Looped(), (batch[0],), config=CONFIG)
    assert (found.graphs, found.summary.replaced) == ((), 0)
    assert [row.reason for row in found.matmuls] == ["graph_break"] * 3
    (only,) = found.breaks
    assert "torch._dynamo.graph_break()" in only.source
    assert "Graph breaks (0 graphs)\n  Call to" in str(found)


@pytest.mark.slow
def test_a_failing_model_is_left_as_it_is(batch):
    class Failing(Broken):
        def forward(self, x: Tensor) -> Tensor:
            self.late = super().forward(x)
            raise KeyError("later")

    model = Failing()
    with pytest.raises(Exception, match="later"):
        explain(model, (batch[0],))
    assert model.calls == 0
    assert not hasattr(model, "late")


@pytest.mark.slow
def test_models_that_would_not_convert_are_explained_with_reasons(block, batch):
    with torch.no_grad():
        in_eval = explain(block.eval(), (batch[0],), config=CONFIG)
    assert [row.reason for row in in_eval.matmuls] == ["eval", "eval", "eval", "too_small"]
    assert in_eval.summary.parameters.before == in_eval.summary.parameters.after
    with pytest.raises(ValueError, match="args must be a sequence of arguments, or a tensor, got dict; what has names"):
        explain(block, {"x": batch[0]})
    frozen = explain(block.requires_grad_(False), (batch[0],), config=CONFIG)
    assert [row.reason for row in frozen.matmuls] == ["frozen"] * 4
    assert [each.name for each in frozen.graphs] == ["graph 0, captured", "graph 0, forward"]


@pytest.mark.slow
def test_checkpointed_regions_and_symbolic_sizes(checkpointed_block, batch):
    torch._dynamo.mark_dynamic(batch[0], 0)
    found = explain(checkpointed_block, (batch[0],), config=CONFIG)
    assert [(row.name, row.decision) for row in found.matmuls][:3] == [
        ("up.weight", "replaced"),
        ("down.weight", "replaced"),
        ("mix", "replaced"),
    ]
    assert all(isinstance(row.tokens, str) and row.tokens.startswith("s") for row in found.matmuls)
    nodes = {node.id for node in found.graphs[0].before}
    assert all(row.node in nodes for row in found.matmuls)
    assert ["self.up(inner)" in row.source for row in found.matmuls] == [True, True, False, False]


def test_a_weight_that_two_matmuls_read_has_two_rows(batch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    found = explain(Shared(), (batch[0],), config=CONFIG)
    assert [row.name for row in found.matmuls] == ["layer.weight"] * 2
    assert len({row.node for row in found.matmuls}) == 2
    assert found.summary.bytes.before == 64 * 64 * 16  # once


def test_a_meta_model_allocates_nothing(block_class):
    with torch.device("meta"):
        model = block_class()
    found = explain(model, (torch.randn(32, 64, device="meta"),), config=CONFIG)
    assert found.summary.replaced == 3
    assert all(each.is_meta for each in model.parameters())


def test_json_round_trips_and_folding_keeps_the_text_short(batch, tmp_path):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    found = explain(model, (batch[0],), config=CONFIG)
    assert slcompile.Explanation.from_json(found.to_json(tmp_path / "e.json")) == found
    assert [each.name for each in tmp_path.iterdir()] == ["e.json"]
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["schema"] == "slcompile.explain/3"
    assert document["summary"]["matmuls"] == {"replaced": 4, "total": 4}
    assert max(map(len, str(found).splitlines())) <= 100


def test_bad_arguments(block, batch):
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got int"):
        explain(3)
    with pytest.raises(ValueError, match="config must be an SLConfig"):
        explain(block, (batch[0],), config={"rank": 3})
    with pytest.raises(ValueError, match="matches no parameter"):
        explain(block, (batch[0],), config=SLConfig(exclude=("*nothing*",)))


SCRIPT = """
import torch, slcompile
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
compiled = torch.compile(model, backend="sltrain", options={"rank": 8, "lowering": "composed"})
compiled(torch.randn(32, 64)).sum().backward()
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[str, Path]:
    """What a compile printed, and its structured trace."""
    folder = tmp_path_factory.mktemp("logged")
    env = {**os.environ, "TORCH_LOGS": "+slcompile", "TORCH_TRACE": str(folder / "trace")}
    env |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # what is cached meets no pass
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    (trace,) = (folder / "trace").iterdir()
    return done.stderr, trace


@pytest.mark.slow
def test_torch_logs_prints_decisions(logged):
    printed, _ = logged
    assert "+ 0.weight 64x64" in printed
    assert "- 2.weight 8x64  too_small: has fewer than 32 rows or columns" in printed
    assert "recompute_weights: " in printed
    assert "must_recompute" in printed


@pytest.mark.slow
def test_the_structured_trace_holds_graphs_and_decisions(logged):
    lines = logged[1].read_text().splitlines()
    found: dict[str, str] = {}
    for index, line in enumerate(lines):
        if '"artifact": {"name": "slcompile_' in line:
            name = json.loads(line[line.index("{") :])["artifact"]["name"]
            payload = []
            for following in lines[index + 1 :]:
                if not following.startswith("\t"):
                    break
                payload.append(following[1:])
            found.setdefault(name, "\n".join(payload))
    assert set(found) == {"slcompile_before", "slcompile_after", "slcompile_matmuls"}
    assert "compose" not in found["slcompile_before"]
    assert "slcompile.compose.default" in found["slcompile_after"]
    decisions = {each["name"]: each for each in json.loads(found["slcompile_matmuls"])["decisions"]}
    assert decisions["0.weight"]["decision"] == "replaced"
    assert (decisions["2.weight"]["decision"], decisions["2.weight"]["reason"]) == ("left", "too_small")


TLPARSE = shutil.which("tlparse", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(TLPARSE is None, reason="needs tlparse (pip install 'slcompile[test]')")
@pytest.mark.slow
def test_tlparse_shows_graphs_and_decisions(logged, tmp_path):
    out = tmp_path / "out"
    subprocess.run([TLPARSE, logged[1], "-o", out, "--no-browser"], capture_output=True, check=True)
    links = re.findall(r'href="([^"]*/(slcompile_\w+?)_\d+\.(?:txt|json))"', (out / "index.html").read_text())
    pages = {name: (out / path).read_text() for path, name in links}
    assert set(pages) == {"slcompile_before", "slcompile_after", "slcompile_matmuls"}
    assert "compose" not in pages["slcompile_before"]
    assert "slcompile.compose.default" in pages["slcompile_after"]
    assert {each["name"] for each in json.loads(pages["slcompile_matmuls"])["decisions"]} == {"0.weight", "2.weight"}


def test_page_and_notebook(block, batch, tmp_path):
    found = explain(block, (batch[0],), config=CONFIG)
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "slcompile.explain/3" in page
    assert found._repr_html_().startswith("<iframe")


@pytest.mark.slow
def test_nothing_is_said_about_a_model_that_was_only_explained(block, batch, caplog):
    with caplog.at_level(logging.WARNING, "slcompile"):
        explain(block, (batch[0],), config=CONFIG)
    assert caplog.records == []
    assert torch.compile(block, backend="sltrain", options={"rank": 8})(batch[0]).requires_grad
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight", "mix"}
