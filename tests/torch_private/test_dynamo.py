"""The private parts of Dynamo that we lean on: a new torch that moves one fails here first."""

from __future__ import annotations

import gc

import torch
from torch import nn

from slcompile import torch_private
from tests.torch_private.capture import capture


def test_captured_inputs_are_fake_and_in_order(block, batch):
    gm = capture(block, batch[0])
    inputs = torch_private.captured_inputs(gm)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len(names) == 7
    assert all(isinstance(each, torch._subclasses.FakeTensor) for each in inputs)


def test_a_graph_compiles_later_in_its_resumed_context(block):
    contexts, modes = [], []

    def within(gm, inputs):
        contexts.append(torch_private.tracing_context())
        modes.append(torch_private.fake_mode())

    gm = capture(block, torch.randn(5, 64), dynamic=True, within=within)
    assert contexts[0] is not None
    assert isinstance(modes[0], torch._subclasses.FakeTensorMode)
    with torch_private.resume(contexts[0]):
        compiled = torch_private.inductor(gm, torch_private.captured_inputs(gm), {})
    parameters = dict(block.named_parameters())
    for size in (5, 8):
        x = torch.randn(size, 64)
        given = {"size": size, "x": x}
        args = []
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["example_value"]
                if not isinstance(value, torch.Tensor):
                    args.append(given["size"])
                elif value.requires_grad:
                    args.append(next(p for n, p in parameters.items() if n.replace(".", "_") in _flat(node.name)))
                else:
                    args.append(given["x"])
        torch.testing.assert_close(compiled(*args)[0], block(x))


def _flat(name: str) -> str:
    """Dynamo's placeholder name without the path through ``_modules`` and ``_parameters``."""
    return name.replace("_modules_", "_").replace("_parameters_", "_").strip("_")


def test_zero_outputs_have_the_sizes_of_the_arguments(block):
    gm = capture(block, torch.randn(5, 64), dynamic=True)
    args = [7 if isinstance(value, torch.SymInt) else torch.empty(7, 64) for value in torch_private.captured_inputs(gm)]
    (zeros,) = torch_private.zero_outputs(gm)(*args)
    assert zeros.shape == (7, 5)
    assert zeros.requires_grad
    assert not zeros.is_leaf


def test_break_reasons():
    reasons = []

    def function(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    def backend(gm, inputs):
        reasons.append(torch_private.break_reason(gm))
        return gm.forward

    torch.compile(function, backend=backend)(torch.ones(3))
    first, last = reasons
    assert "graph_break" in first[0]
    assert "test_dynamo.py" in first[1]
    assert last is None


def test_the_collector_is_paused_and_goes_on():
    with torch_private.collector_paused():
        assert not gc.isenabled()
        assert not torch._dynamo.config.run_gc_after_compile
    assert gc.isenabled()
    assert torch._dynamo.config.run_gc_after_compile


def looped(x):
    for _ in range(2):
        torch._dynamo.graph_break()
    return x + 1


def test_skipped_frames_are_those_that_dynamo_gave_up():
    kept = torch._dynamo.utils._compilation_metrics.maxlen
    with torch_private.skipped_frames() as skipped:
        torch.compile(lambda x: looped(x) + 1, backend="eager")(torch.ones(3))
    (only,) = skipped
    assert only.code == (looped.__code__.co_filename, looped.__code__.co_firstlineno)
    assert "graph_break" in only.reason
    assert f"line {looped.__code__.co_firstlineno + 2}, in looped" in only.stack_trace
    assert torch._dynamo.utils._compilation_metrics.maxlen == kept
    with torch_private.skipped_frames() as skipped:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert skipped == []


def test_what_is_disabled():
    module, function = nn.Linear(3, 3), torch.compiler.disable(looped)
    assert torch_private.is_disabled(function)
    assert torch_private.without_disable(function) is looped
    assert torch_private.is_disabled(torch.compiler.disable(module))
    for enabled in (looped, module, torch.compile(module), None):
        assert not torch_private.is_disabled(enabled)


def test_nodes_that_set_the_grad_mode():
    class Partly(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x + 1
            return x * y

    nodes = capture(Partly(), torch.randn(3, requires_grad=True)).graph.nodes
    assert [bool(node.args[0]) for node in nodes if torch_private.sets_grad_mode(node)] == [False, True]


def test_a_new_fake_mode_makes_tensors_without_memory():
    with torch_private.new_fake_mode():
        huge = torch.empty(2**50)
    assert huge.shape == (2**50,)


def test_kept_inputs_are_those_that_the_code_around_the_graph_loads_again():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Parameter(torch.randn(3, 3)) for _ in range(5))

        def forward(self, x):
            a, c = self.a, self.c
            y = x @ a @ self.b @ c @ self.d @ self.e
            self.stored = [self.d]
            return {"y": y, "c": (c,), "e": self.e.T}

    kept, views = [], []

    def within(gm, inputs):
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        kept.extend(names[index] for index in torch_private.kept_inputs(gm))
        views.extend(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.numpy_T))

    capture(Keeping(), torch.randn(2, 3), within=within)
    again = "cd" if views else "cde"  # torch 2.14 has the view in the graph
    assert sorted(kept) == [f"l_self_parameters_{name}_" for name in again]


def test_looking_for_kept_inputs_leaves_the_graph_as_it_is():
    """A local variable that only the code after a graph break reads is no input of the graph before it."""

    def function(x, only_later):
        y = x.sin()
        torch._dynamo.graph_break()
        return y + only_later

    counts = []

    def backend(gm, inputs):
        torch_private.kept_inputs(gm)
        counts.append((len(gm.graph.find_nodes(op="placeholder")), len(inputs)))
        return gm.forward

    torch.compile(function, backend=backend)(torch.ones(3), torch.ones(3))
    assert counts == [(1, 1), (2, 2)]


def test_recurrent_layers_are_captured_on_request():
    layer, x = nn.LSTM(4, 4), torch.randn(3, 2, 4)
    for context, count in ((torch_private.unlimited_recompiles(), 0), (torch_private.capturing_rnns(), 1)):
        graphs = []
        torch._dynamo.reset()
        with context:
            torch.compile(lambda x: layer(x + 1)[0], backend=lambda gm, _, graphs=graphs: graphs.append(gm) or gm)(x)
        assert len(graphs) == count


def test_an_unshared_backend_finds_nothing_that_another_compiled(monkeypatch):
    captured = []

    def count(gm, inputs, *, options):
        captured.append(options)
        return gm.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: count)

    def double(x):
        return 2 * x

    for _ in range(2):
        torch.compile(double, backend=torch_private.unshared("any", options=4))(torch.ones(2))
    assert captured == [4, 4]
