"""The runner: it names and times reports, lints what changed, and tells whoever watches."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile.passes import Decision, PassReport, run
from slcompile.passes.graph import Inserter, pass_name


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def erase_relus(gm: fx.GraphModule, but: int = 0) -> PassReport:
    report = PassReport()
    for node in [node for node in gm.graph.nodes if node.name == "_1"][but:]:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        report.replaced.append(Decision(node.name))
    return report


def leave_all(gm: fx.GraphModule) -> PassReport:
    return PassReport("of another name", left=[Decision("relu", "why", "because")])


def test_reports_bear_the_names_of_their_functions_whatever_the_function_wrote():
    reports = run([leave_all, functools.partial(erase_relus, but=1), erase_relus], traced())
    assert [each.pass_name for each in reports] == ["leave_all", "erase_relus", "erase_relus"]
    assert [len(each.replaced) for each in reports] == [0, 0, 1]
    assert all(each.seconds > 0 for each in reports)
    assert pass_name(functools.partial(erase_relus, but=1)) == pass_name(erase_relus) == "erase_relus"


def test_who_watches_is_told_of_every_pass_with_the_graph_before_and_after():
    seen = []
    run([leave_all, erase_relus], traced(), lambda report, before, after: seen.append((report, before, after)))
    (left, first, second), (replaced, third, fourth) = seen
    assert (left.pass_name, replaced.pass_name) == ("leave_all", "erase_relus")
    assert first == second == third
    assert first.keys() - fourth.keys() == {"_1"}


def test_a_pass_that_breaks_the_graph_is_caught():
    def break_graph(gm: fx.GraphModule) -> PassReport:
        first, *_, last = gm.graph.nodes
        last.append(first)  # what reads the input now comes before it
        return PassReport(replaced=[Decision("x")])

    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        run([break_graph], traced())


def test_passes_are_logged_with_what_they_changed(caplog):
    with caplog.at_level(logging.DEBUG, "slcompile.passes"):
        run([leave_all, erase_relus], traced())
    left, replaced = (record.getMessage() for record in caplog.records)
    assert left == "leave_all: 0 replaced, 1 left\n  - relu   why: because\n"
    assert replaced.startswith("erase_relus: 1 replaced, 0 left\n  + _1 \n")
    assert "\n-" in replaced.partition("+ _1")[2]


def test_a_report_as_json_and_as_text():
    report = PassReport("name")
    report.add(Decision("a", shape=(2, 3), matmuls=1), is_replaced=True)
    report.add(Decision("b", "code", "a sentence", torch.Size([4, 5])), is_replaced=False)
    assert report.to_dict() == {
        "pass": "name",
        "decisions": [
            {"name": "a", "decision": "replaced", "reason": "", "detail": "", "shape": [2, 3], "matmuls": 1},
            {"name": "b", "decision": "left", "reason": "code", "detail": "a sentence", "shape": [4, 5], "matmuls": 0},
        ],
    }
    assert str(report) == "name: 1 replaced, 1 left\n  + a 2x3\n  - b 4x5  code: a sentence"


def test_what_was_inlined_twice_is_told_apart_in_what_is_inlined_next():
    """Results of one traced function have one fake tensor: B and the values, cast alike, where rank equals groups."""

    def narrowed(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    def apart(x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y

    gm = make_fx(lambda x, y: x + y, tracing_mode="fake")(torch.ones(3, 2), torch.ones(3, 2))
    (total,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    insert = Inserter(gm.graph)
    first, second = (insert.inline(total, narrowed, each) for each in total.args)
    total.replace_all_uses_with(insert.inline(total, apart, first, second), propagate_meta=False)
    gm.recompile()
    assert gm(torch.full((3, 2), 5.0), torch.ones(3, 2)).unique().tolist() == [3.0]
