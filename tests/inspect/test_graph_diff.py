from __future__ import annotations

import time

import pytest
import torch
from torch import fx, nn

import slcompile
from slcompile.inspect.snapshot import snapshot, source_line
from slcompile.passes.graph_text import diff


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6))
        self.down = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.relu(x @ self.up) @ self.down


def statuses(nodes) -> dict[str, str]:
    return {node.id: node.status for node in nodes}


def test_a_copy_is_all_kept():
    gm = fx.symbolic_trace(TwoLayers())
    found = slcompile.graph_diff(gm, fx.GraphModule(gm, gm.graph))
    assert found.counts == {"kept": 7, "removed": 0, "new": 0, "rewritten": 0}
    assert found.text() == "graph: 7 kept, 0 removed, 0 new, 0 rewritten"
    assert [node.weight for node in found.after if node.op == "get_attr"] == ["up", "down"]


def test_the_text_shows_what_a_pass_changed():
    before = fx.symbolic_trace(TwoLayers())
    after = fx.symbolic_trace(TwoLayers())
    (relu,) = after.graph.find_nodes(op="call_function", target=torch.relu)
    with after.graph.inserting_before(relu):
        scaled = after.graph.call_function(torch.mul, (relu.args[0], 2.0))
        gelu = after.graph.call_function(torch.nn.functional.gelu, (scaled,))
    relu.replace_all_uses_with(gelu)
    after.graph.erase_node(relu)
    found = slcompile.graph_diff(before, after, name="activation")
    assert found.text().splitlines() == [
        "activation: 6 kept, 0 removed, 1 new, 1 rewritten",
        "  ...",
        "  up = up()",
        "  matmul = matmul(x, up)",
        "- relu = torch.relu(matmul)",
        "+ mul = torch.mul(matmul, 2.0)",
        "+ gelu = torch._C._nn.gelu(mul)",
        "  down = down()",
        "- matmul_1 = matmul(relu, down)",
        "+ matmul_1 = matmul(gelu, down)",
        "  output = output(matmul_1)",
    ]
    # gelu stands where relu stood: what reads it is the same.
    (rewritten,) = [node for node in found.after if node.status == "rewritten"]
    assert (rewritten.id, rewritten.origins) == ("gelu", ("relu",))
    assert statuses(found.before)["relu"] == "rewritten"
    assert statuses(found.after)["mul"] == "new"


def test_another_argument_makes_a_node_rewritten_and_its_readers_stay_kept():
    before, after = (fx.symbolic_trace(lambda x: torch.sum(torch.add(x, 1), 0)) for _ in range(2))
    (add,) = after.graph.find_nodes(op="call_function", target=torch.add)
    add.args = (add.args[0], 2)
    found = slcompile.graph_diff(before, after)
    assert statuses(found.after) == {"x": "kept", "add": "rewritten", "sum_1": "kept", "output": "kept"}
    assert found.counts["rewritten"] == 1


def test_nodes_with_other_names_are_matched_by_what_they_compute():
    before = fx.symbolic_trace(lambda x: torch.relu(torch.neg(x)))
    after = fx.symbolic_trace(lambda x: torch.relu(torch.neg(x)))
    for node in after.graph.nodes:
        if node.op == "call_function":
            node._rename(f"other_{node.name}")
    found = slcompile.graph_diff(before, after)
    assert found.counts == {"kept": 4, "removed": 0, "new": 0, "rewritten": 0}
    assert [node.origins for node in found.after] == [("x",), ("neg",), ("relu",), ("output",)]
    assert len(found.text().splitlines()) == 1


def test_provenance_leads_from_a_lowered_graph_to_the_one_it_was_traced_from():
    gm = fx.symbolic_trace(lambda x: torch.nn.functional.silu(x))
    with fx.traceback.preserve_node_meta():
        lowered = torch.fx.experimental.proxy_tensor.make_fx(
            fx.Interpreter(gm).run, decomposition_table=torch._decomp.core_aten_decompositions()
        )(torch.randn(3))
    found = slcompile.graph_diff(gm, lowered)
    silu = next(node.id for node in found.before if node.op == "call_function")
    assert any(node.origins == (silu,) for node in found.after if node.op == "call_function")


def test_json_round_trips(tmp_path):
    gm = fx.symbolic_trace(TwoLayers())
    found = slcompile.graph_diff(gm, fx.symbolic_trace(nn.ReLU()))
    path = found.to_json(tmp_path / "diff.json")
    assert slcompile.GraphDiff.from_json(path) == found
    document = found.to_dict()
    assert document["schema"] == "slcompile.graph_diff/2"
    assert set(document) == {"schema", "name", "before", "after", "counts", "modules", "sources"}
    node = document["after"]["nodes"][0]
    assert set(node) == {
        "id", "op", "target", "args", "inputs", "shape", "dtype", "module", "status", "from", "weight", "source",
    }  # fmt: skip


def test_bad_arguments_and_files(tmp_path):
    gm = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ValueError, match=r"after must be a torch\.fx\.GraphModule, got ReLU"):
        slcompile.graph_diff(gm, nn.ReLU())
    with pytest.raises(ValueError, match="does not exist"):
        slcompile.graph_diff(gm, gm).to_json(tmp_path / "missing" / "diff.json")
    (tmp_path / "other.json").write_text('{"schema": "slcompile.graph_diff/0"}')
    with pytest.raises(ValueError, match=r"schema must be 'slcompile\.graph_diff/2', got"):
        slcompile.GraphDiff.from_json(tmp_path / "other.json")
    (tmp_path / "half.json").write_text('{"schema"')
    with pytest.raises(ValueError, match="holds no JSON"):
        slcompile.GraphDiff.from_json(tmp_path / "half.json")


def chain(length: int) -> fx.GraphModule:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        node = graph.call_function(torch.relu, (node,))
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.slow
def test_time_is_linear_in_nodes():
    def seconds(length: int) -> float:
        first, second = chain(length), chain(length)
        second.graph.find_nodes(op="call_function", target=torch.relu)[length // 2].target = torch.neg
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            slcompile.graph_diff(first, second).text()
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(8000) < 16 * seconds(1000)  # 8 times the nodes; quadratic would be 64


def test_a_line_that_moved_is_removed_and_added():
    before = {name: name for name in "abcdef"}
    after = {name: name for name in "abdefc"}
    assert diff(before, after, context=1).splitlines() == ["  ...", "  b", "- c", "  d", "  ...", "  f", "+ c"]
    assert diff(before, before) == ""


def test_source_lines_are_the_users_own():
    trace = (
        '  File "/home/me/model.py", line 12, in forward\n    return self.up(x)\n'
        f'  File "{torch.__path__[0]}/nn/modules/linear.py", line 134, in forward\n    return F.linear(x)\n'
    )
    assert source_line(trace) == "model.py:12 in forward: return self.up(x)"
    assert source_line("") == ""


def test_module_paths_are_those_of_the_model():
    exported = torch.export.export(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), (torch.randn(2, 4),)).graph
    (linear,) = [node for node in snapshot(exported).nodes if node.target == "aten.linear.default"]
    assert linear.module[-2:] == (("0", "Sequential"), ("0.0", "Linear"))
    assert linear.shape == "[2, 4]"
