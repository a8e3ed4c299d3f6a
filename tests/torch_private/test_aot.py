"""The private parts of AOTAutograd and its tracing that we lean on: a new torch that moves one fails here first."""

from __future__ import annotations

import torch

from slcompile import torch_private
from tests.torch_private.capture import capture, symbolic_input


def test_lowering_inside_a_backend_inlines_checkpoints_and_keeps_the_placeholders(checkpointed_block, batch):
    lowered = []

    def within(gm, inputs):
        lowered.append(torch_private.lower_to_aten(gm, torch_private.captured_inputs(gm)))
        assert sum(node.op == "placeholder" for node in lowered[0].graph.nodes) == len(inputs)

    capture(checkpointed_block, batch[0], dynamic=True, within=within)
    targets = [str(node.target) for node in lowered[0].graph.nodes if node.op == "call_function"]
    assert targets.count("aten.addmm.default") == 2
    assert targets.count("aten.mm.default") == 2
    assert all(target.startswith("aten.") for target in targets)


def test_joint_forward_and_backward_graphs_know_where_they_come_from(block, batch):
    found, stages = [], []

    def edit(joint, stage):
        stages.append(stage)
        found.append(joint.graph)

    def within(gm, inputs):
        found.extend(torch_private.aot_graphs(gm, inputs, edit))
        found.append([node.name for node in gm.graph.nodes])

    capture(block, batch[0], within=within)
    joint, forward, backward, captured = found
    assert stages == ["joint"]
    places = [torch_private.input_index(node) for node in joint.find_nodes(op="placeholder")]
    assert places == [0, 1, 2, 3, 4, 5, 6, None]  # the last one is the tangent
    products = [node for node in joint.nodes if str(node.target) in ("aten.mm.default", "aten.addmm.default")]
    in_backward = [torch_private.in_backward_pass(node) for node in products]
    assert (in_backward.count(False), in_backward.count(True)) == (4, 7)
    origins = [torch_private.traced_from(node) for node in products[:4]]
    assert all(names[-1] in captured for names in origins)
    assert all(len(part.graph.find_nodes(op="output")) == 1 for part in (forward, backward))


def test_another_partitioner_may_ask_inductors_own(block, batch):
    asked = []

    def partition(joint, inputs, **settings):
        asked.append(settings["compiler"])
        return torch_private.min_cut(joint, inputs, **settings)

    found = []

    def within(gm, inputs):
        found.extend(torch_private.aot_graphs(gm, inputs, lambda *_: None, partition))

    capture(block, batch[0], within=within)
    assert asked == ["inductor"]
    assert len(found) == 2


def test_without_gradients_there_is_one_graph(block, batch):
    found = []

    def within(gm, inputs):
        with torch.no_grad():
            found.extend(torch_private.aot_graphs(gm, inputs, lambda graph, stage: found.append(stage)))

    capture(block.requires_grad_(False), batch[0], within=within)
    assert found[0] == "forward"
    assert len(found) == 2


def test_no_code_is_generated_for_a_forward_graph_that_is_only_traced(block, batch):
    found = []

    def within(gm, inputs):
        found.extend(torch_private.aot_graphs(gm, inputs, lambda graph, stage: None))

    capture(block, batch[0], within=within)
    assert found[0]._needs_recompile()


def test_size_hints_and_fakes_of_a_graph_with_symbolic_sizes(block):
    seen = {}

    def within(gm, inputs):
        x = symbolic_input(gm)
        seen["hints"] = [torch_private.size_hint(size) for size in x.shape]
        seen["fake"] = torch_private.run_fake(torch.ops.aten.mm.default, (x, x.t()))
        traced = torch_private.trace(lambda x: torch.nn.functional.silu(x), [x], for_inductor=True)
        seen["ops"] = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]

    capture(block, torch.randn(5, 64), dynamic=True, within=within)
    assert seen["hints"] == [5, 64]
    assert isinstance(seen["fake"], torch._subclasses.FakeTensor)
    assert len(set(map(str, seen["fake"].shape))) == 1
    assert "aten.silu.default" not in seen["ops"], "silu was not decomposed as for Inductor"
    assert "aten.exp.default" in seen["ops"]
