"""The private parts of Inductor that we lean on, and what is mended in it: what a new torch moves fails here first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slcompile import torch_private
from tests.torch_private.capture import capture, symbolic_input


def test_settings_and_passes():
    assert {"joint_custom_pre_pass", "max_autotune"} <= torch_private.inductor_settings()
    assert torch_private.inductor_modes()["max-autotune"]["max_autotune"] is True
    hook = "joint_custom_pre_pass"
    assert torch_private.passes_of({}, hook) == []
    assert torch_private.passes_of({hook: print}, hook) == [print]
    with torch._inductor.config.patch(joint_custom_pre_pass=repr):
        assert torch_private.passes_of({}, hook) == [repr]
        assert torch_private.passes_of({}, "post_grad_custom_pre_pass") == []


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
