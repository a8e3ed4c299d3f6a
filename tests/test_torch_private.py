"""Each private part of torch that we lean on, so that a new torch version that moves one fails here first."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from slcompile import torch_private
from tests.testing import process_group


def capture(model: nn.Module, *args: torch.Tensor, dynamic: bool | None = None, within=lambda gm, inputs: None):
    """The graph that Dynamo captures; ``within`` runs where a backend would."""
    captured = []

    def backend(gm, inputs):
        captured.append(gm)
        within(gm, inputs)
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    (gm,) = captured
    return gm


def symbolic_input(gm):
    """The tensor among a graph's inputs whose first size is symbolic."""
    tensors = [each for each in torch_private.captured_inputs(gm) if isinstance(each, torch.Tensor)]
    return next(each for each in tensors if isinstance(each.shape[0], torch.SymInt))


def test_captured_inputs_are_fake_and_in_order(block, batch):
    gm = capture(block, batch[0])
    inputs = torch_private.captured_inputs(gm)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len(names) == 7
    assert all(isinstance(each, torch._subclasses.FakeTensor) for each in inputs)


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


def test_settings_and_passes():
    assert {"joint_custom_pre_pass", "max_autotune"} <= torch_private.inductor_settings()
    hook = "joint_custom_pre_pass"
    assert torch_private.passes_of({}, hook) == []
    assert torch_private.passes_of({hook: print}, hook) == [print]
    with torch._inductor.config.patch(joint_custom_pre_pass=repr):
        assert torch_private.passes_of({}, hook) == [repr]
        assert torch_private.passes_of({}, "post_grad_custom_pre_pass") == []


def test_without_wrappers(block):
    assert torch_private.without_wrappers(torch.compile(block)) is block
    assert torch_private.without_wrappers(checkpoint_wrapper(block)) is block
    assert torch_private.without_wrappers(torch.compile(checkpoint_wrapper(block))) is block
    assert torch_private.without_wrappers(block) is block


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
    assert "test_torch_private.py" in first[1]
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


def test_strides_that_are_numbers_of_one_call_follow_from_symbolic_sizes(block):
    seen = []

    def within(gm, inputs):
        x = symbolic_input(gm)
        with x.fake_mode:
            stale = torch.empty_strided(x.shape, (1, 5))
            gaps = torch.empty_strided(x.shape, (1, 8))
            rows = torch.empty_strided(x.shape, (64, 1))
        seen.extend(torch_private.codegen._with_symbolic_strides(each) for each in (stale, gaps, rows, 3))
        assert str(seen[0].stride()) == f"(1, {x.shape[0]})"

    capture(block, torch.randn(5, 64), dynamic=True, within=within)
    assert [each if isinstance(each, int) else each.stride() for each in seen[1:]] == [(1, 8), (64, 1), 3]


def test_a_library_of_compiled_functions():
    library = torch_private.cpp_library('extern "C" int twice(int x) { return 2 * x; }')
    assert library.twice(21) == 42
    assert torch_private.cpp_library('extern "C" int twice(int x) { return 2 * x; }').twice(4) == 8


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux, which says what its CPU has")
def test_amx_is_what_the_cpu_says():
    flags = re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert torch_private.has_amx() == ("amx_tile" in " ".join(flags[:1]).split())


def test_a_fresh_cache_is_empty_and_the_old_one_comes_back(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch_private.fresh_cache():
        assert Path(cache_dir()) not in (tmp_path, Path(default_cache_dir()))
        assert list(Path(cache_dir()).iterdir()) == []
    assert Path(cache_dir()) == tmp_path


def test_compiling_is_no_exporting():
    class Asking(nn.Module):
        def forward(self, x):
            return x + 1 if torch_private.is_exporting() else x - 1

    model, x = Asking(), torch.zeros(3)
    assert not torch_private.is_exporting()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), x - 1)
    for strict in (False, True):
        torch._dynamo.reset()
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), x + 1)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), x - 1)


def test_lite_mode_is_known():
    assert not torch_private.calls_aten()
    with torch._inductor.config.patch(torch._inductor.list_mode_options()["lite"]):
        assert torch_private.calls_aten()


def test_higher_order_ops_are_known():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    plain = graph.call_function(torch.ops.aten.sin.default, (x,))
    wrapped = graph.call_function(torch.ops.higher_order.run_and_save_rng_state, (torch.ops.aten.sin.default, x))
    assert [torch_private.is_higher_order(node) for node in (x, plain, wrapped)] == [False, False, True]


def test_graphs_of_higher_order_ops_are_known():
    def branching(x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    seen = []
    settings = {
        "post_grad_custom_pre_pass": lambda graph: seen.append(torch_private.is_subgraph(graph.owning_module)),
        "fx_graph_cache": False,
    }
    gm = capture(branching, torch.ones(4))
    torch_private.inductor(gm, [torch.ones(4)], settings)(torch.ones(4))
    assert sorted(seen) == [False, True, True]


def test_what_the_user_gets_is_known():
    """Of a forward graph that saves a result for the backward one."""
    seen = []

    def note(graph):
        (output,) = graph.find_nodes(op="output")
        seen.append((torch_private.returned_to_user(output), len(output.args[0])))

    def compiled(gm, inputs):
        return torch_private.inductor(gm, inputs, {"post_grad_custom_pre_pass": note, "fx_graph_cache": False})

    torch.compile(lambda x: x.sin().exp(), backend=compiled)(torch.ones(4, requires_grad=True)).sum().backward()
    (user, count), *_ = seen
    assert user == [0]
    assert count > 1


@pytest.mark.slow
def test_a_scatter_of_transposed_tiles_goes_where_it_should():
    """Inductor's own tiled kernel writes beyond the result, see _mend_inductor."""

    def scattered(first, second, third, rows, ids):
        return torch.zeros(96, 64).index_put((ids,), (first.t() + second.t() + third.t()) * rows, accumulate=True)

    args = *torch.randn(3, 64, 128).unbind(), torch.randn(128, 64), torch.randint(0, 32, (128,))
    gm = capture(scattered, *args)
    (found,) = torch_private.inductor(gm, list(args), {"fx_graph_cache": False})(*args)
    torch.testing.assert_close(found, scattered(*args))


@pytest.mark.parametrize(("tokens", "dtype", "threads"), [(32, torch.float32, 1), (40, torch.bfloat16, 2)])
def test_rows_of_a_tile_do_not_share_a_local_buffer(tokens, dtype, threads):
    """Inductor's own kernels take the last row of each tile for all of them, see _mend_inductor."""

    def gated_norm(a, b, c, d, first, second):  # in the order in which they are read, as the graph takes them
        hidden = a + b + c + d + first.t()
        return hidden * hidden.square().mean(-1, keepdim=True).rsqrt() * second.t()

    args = [torch.randn(shape).to(dtype) for shape in [(tokens, 64)] * 4 + [(64, tokens)] * 2]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gm = capture(gated_norm, *args)
        (found,) = torch_private.inductor(gm, list(args), {"fx_graph_cache": False})(*args)
    finally:
        torch.set_num_threads(before)
    exact = gated_norm(*(each.double() for each in args))
    eager, error = ((each - exact).norm() for each in (gated_norm(*args), found))
    assert error <= 2 * eager + 2**-22 * exact.norm()


def test_partitioned_graphs_are_those_of_forward_and_backward(block, batch):
    graphs = []
    capture(block, batch[0], within=lambda gm, inputs: graphs.extend(torch_private.partitioned(gm, inputs, {})))
    forward, backward = graphs
    assert any(node.name.startswith("tangents") for node in backward.graph.find_nodes(op="placeholder"))
    assert not any(node.name.startswith("tangents") for node in forward.graph.find_nodes(op="placeholder"))
    with torch.no_grad():
        torch._dynamo.reset()
        graphs.clear()
        capture(block, batch[0], within=lambda gm, inputs: graphs.extend(torch_private.partitioned(gm, inputs, {})))
    assert len(graphs) == 1


def test_a_new_fake_mode_makes_tensors_without_memory():
    with torch_private.new_fake_mode():
        huge = torch.empty(2**50)
    assert huge.shape == (2**50,)


@pytest.mark.parametrize("threshold", [3, 4])
def test_realize_reads_threshold_is_what_inductor_keeps_to(threshold):
    """``sin`` of a sum of four inputs has two readers, which are no part of one loop."""

    def function(*inputs):
        wide = sum(inputs).sin()
        return wide.sum(0) + wide.sum(1)

    inputs = [torch.randn(48, 48) for _ in range(4)]
    with torch._inductor.config.patch(realize_reads_threshold=threshold, fx_graph_cache=False):
        assert torch_private.realize_reads_threshold() == threshold
        code, *_ = torch._inductor.utils.get_code(torch.compile(function), *inputs)  # nothing is compiled
    is_written = "empty_strided_cpu((48, 48)" in code
    assert is_written == (len(inputs) > threshold)


def test_post_accumulate_hooks(block):
    assert torch_private.post_accumulate_hooks(block.mix) == []
    hooks = [lambda p: None, lambda p: None]
    handles = [block.mix.register_post_accumulate_grad_hook(each) for each in hooks]
    assert torch_private.post_accumulate_hooks(block.mix) == hooks
    handles[0].remove()
    assert torch_private.post_accumulate_hooks(block.mix) == hooks[1:]


def test_a_step_without_its_hooks(block):
    class Fresh(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    bare = Fresh.step
    assert torch_private.step_without_hooks(Fresh) is bare
    Fresh(block.parameters(), lr=0.1)  # puts the hooks there
    assert Fresh.step is not bare
    assert torch_private.step_without_hooks(Fresh) is bare


def test_a_look_at_each_state_dict_before_it_is_loaded(block, monkeypatch):
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)  # put back afterwards
    seen = []
    torch_private.before_load_state_dict(lambda *given: seen.append(given))
    state = block.state_dict()
    assert block.load_state_dict(state, strict=False).missing_keys == []
    assert seen == [(block, state, False, False)]


def test_kept_inputs_are_those_that_the_code_around_the_graph_loads_again():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(3, 3)) for _ in range(4))

        def forward(self, x):
            a, c = self.a, self.c
            y = x @ a @ self.b @ c @ self.d
            self.stored = [self.d]
            return {"y": y, "c": (c.T,)}

    kept = []

    def within(gm, inputs):
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        kept.extend(names[index] for index in torch_private.kept_inputs(gm))

    capture(Keeping(), torch.randn(2, 3), within=within)
    assert sorted(kept) == ["l_self_parameters_c_", "l_self_parameters_d_"]


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


def test_transforms_and_forward_mode_are_noticed_in_eager_mode_and_by_dynamo():
    def run(x):
        factor = 2 if torch_private.is_transforming() else 3
        return (factor * x).sum()

    x = torch.ones(2)
    for function in (run, torch.compile(run, backend="eager", fullgraph=True)):
        assert function(x) == 6
        with torch.autograd.forward_ad.dual_level():
            assert function(x) == 4
    for transform in (torch.func.grad, torch.func.vmap):
        assert torch.equal(transform(run)(x), torch.tensor([2.0, 2.0]))
        assert torch.equal(torch.compile(lambda x, each=transform: each(run)(x), backend="eager")(x), 2 * x)


def test_eager_checkpoints_are_noticed():
    seen = []

    def function(x):
        seen.append(torch_private.in_eager_checkpoint())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    function(x)
    for reentrant in (False, True):
        torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant).sum()
    with torch.autograd.graph.save_on_cpu():
        function(x)
    assert seen == [False, True, False, False]


def test_recurrent_layers_are_captured_on_request():
    layer, x = nn.LSTM(4, 4), torch.randn(3, 2, 4)
    for context, count in ((torch_private.unlimited_recompiles(), 0), (torch_private.capturing_rnns(), 1)):
        graphs = []
        torch._dynamo.reset()
        with context:
            torch.compile(lambda x: layer(x + 1)[0], backend=lambda gm, _, graphs=graphs: graphs.append(gm) or gm)(x)
        assert len(graphs) == count


def test_ddp_leaves_gradients_in_its_buckets_and_calls_back_before_it_ends(tmp_path):
    calls: list[bool] = []
    with process_group(tmp_path):
        layer = nn.Linear(4, 4)
        wrapped = nn.parallel.DistributedDataParallel(layer)

        def hook(state, bucket):
            def callback() -> None:
                calls.append(torch_private.in_backward())
                for parameter in bucket.parameters():
                    parameter.grad = None

            torch_private.after_backward(callback)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        assert torch_private.bucket_hooks(wrapped) == []
        wrapped.register_comm_hook(None, hook)
        assert torch_private.bucket_hooks(wrapped) == [hook]
        wrapped(torch.ones(2, 4)).sum().backward()
        assert calls == [True]
        assert all(each.grad is not None for each in layer.parameters())  # copied after that
        layer.zero_grad()
        torch_private.leave_gradients_in_buckets(wrapped)
        wrapped(torch.ones(2, 4)).sum().backward()
        assert calls == [True, True]
        assert all(each.grad is None for each in layer.parameters())


def test_watching_sees_the_ops_of_both_passes_and_not_its_own():
    seen = []

    def see(name, args, result):
        seen.append(name)
        torch.mm(torch.ones(1, 1), torch.ones(1, 1))

    weight, x = torch.randn(4, 3), torch.randn(2, 5, 3, requires_grad=True)
    with torch_private.Watching(see):
        y = nn.functional.linear(x, weight, torch.zeros(4))
        forward = list(seen)
        torch.autograd.grad(y.sum(), x)
    torch.mm(weight, weight.t())
    assert forward.count("addmm") == 1
    assert seen.count("mm") == 1  # the input's gradient


def test_memory_is_told_apart_also_when_it_was_freed():
    tensor = torch.randn(1000)
    memory = torch_private.memory_of(tensor)
    assert memory == torch_private.memory_of(tensor[3:].view(-1, 1)) == torch_private.memory_of(tensor.detach())
    assert len({memory, torch_private.memory_of(tensor.t())}) == 1
    assert not memory.expired()
    del tensor
    assert memory.expired()  # it was not kept
    others = [torch.randn(1000) for _ in range(50)]
    assert not any(torch_private.memory_of(each) == memory for each in others)
