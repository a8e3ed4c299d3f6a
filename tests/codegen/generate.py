"""Inductor's code for a GPU, generated without one.

Autograd needs a device that is there, so that Dynamo and AOTAutograd trace on fake tensors of the CPU. At the joint
graph, before any pass of Inductor's or ours, every node is moved to the GPU: the joint passes, the partitioner, the
passes after it, the scheduler and the code generator see CUDA. What they generate is kept and not loaded.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import slcompile
from slcompile import torch_private
from slcompile.backend import sltrain
from tests.codegen.pretend import DEVICE, pretended_h100, templates_win

FACTORS = ("rank", "density", "support", "vector", "base")


@dataclass
class Generated:
    """A module that Inductor generated, and what it is called with.

    Attributes:
        code: Its text.
        inputs: Shape, strides and dtype of each tensor; a number for each symbolic size.
    """

    code: str = ""
    inputs: list[Any] = field(default_factory=list)


def generate(
    model: nn.Module,
    args: Sequence[tuple[tuple[int, ...], torch.dtype]],
    options: dict[str, Any],
    *,
    backend: str = "sltrain",
    training: bool = True,
    dynamic: bool = False,
) -> list[Generated]:
    """What Inductor generates for a training step (forward, backward), or for inference, on an H100.

    Args:
        model: On the meta device; factorized here unless the backend is ``"inductor"``.
        args: Shape and dtype of each argument; those of floating numbers need gradients.
        options: Of the backend; those of FACTORS are of the factors.
        backend: ``"sltrain"`` or ``"inductor"``.
        training: Whether gradients are needed.
        dynamic: Whether the first axis of the first argument, the tokens, is symbolic.
    """
    if backend == "sltrain":
        config = {key: value for key, value in options.items() if key in FACTORS}
        examples = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in args)
        slcompile.factorize_(model, slcompile.SLConfig(**config, seed=0), example_args=examples)
    found: list[Generated] = []
    mode = torch_private.new_fake_mode()

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if backend == "sltrain":
            sltrain(gm, inputs, options=options)
        else:
            torch_private.inductor(gm, inputs, options.get("inductor", {}))
        return gm.forward  # what is generated is not run

    _trace_patterns()
    torch._dynamo.reset()  # else it would count the earlier models' classes as recompiles of this one's
    with mode:
        _give_memory(model)
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in args]
        tensors = [each.requires_grad_(training and each.is_floating_point()) for each in tensors]
        if dynamic:
            torch._dynamo.mark_dynamic(tensors[0], 0)
        with pretended_h100(), _kept(found), templates_win(), torch.set_grad_enabled(training):
            torch.compile(model, backend=compiled, fullgraph=True, dynamic=None if dynamic else False)(*tensors)
    return found


def _trace_patterns() -> None:
    """Inductor traces its patterns once, on tensors that must be there; what they match is the same on every device."""
    from torch._inductor.fx_passes import joint_graph, post_grad

    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()


def _give_memory(model: nn.Module) -> None:
    """Moves a model from the meta device to the CPU; under a fake mode that takes no memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")


def _moved(value: Any, mode: Any) -> Any:
    """A fake tensor of the same shape and strides on the GPU."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    return made.requires_grad_() if value.requires_grad and value.is_floating_point() else made


def _mode_of(gm: fx.GraphModule) -> Any:
    return torch._guards.detect_fake_mode([node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")])


def _move(gm: fx.GraphModule) -> None:
    """Moves a graph to the GPU, in place."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def replaced(value: Any) -> Any:
        return DEVICE if isinstance(value, torch.device) and value.type == "cpu" else value

    mode = _mode_of(gm)
    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, replaced)
        node.kwargs = fx.node.map_aggregate(node.kwargs, replaced)
    with torch.no_grad(), disable_proxy_modes_tracing():
        inputs = [_moved(node.meta["val"], mode) for node in gm.graph.find_nodes(op="placeholder")]
        inputs = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)


def _described(value: Any) -> Any:
    """Shape, strides and dtype of a tensor, as numbers; asking a symbolic size for its own would guard it."""
    if isinstance(value, Tensor):
        shape, strides = (tuple(map(torch_private.size_hint, each)) for each in (value.shape, value.stride()))
        return shape, strides, value.dtype
    return torch_private.size_hint(value) if isinstance(value, torch.SymInt) else value


@contextlib.contextmanager
def _kept(found: list[Generated]) -> Iterator[None]:
    """Graphs move to the GPU; the modules generated for them go to ``found``."""
    from torch._inductor import compile_fx, config, graph
    from torch._inductor.output_code import set_tracing_context_output_strides

    joint, inner = compile_fx._recursive_joint_graph_passes, compile_fx.compile_fx_inner
    takes_device = "input_device" in inspect.signature(joint).parameters

    def moved_joint(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _move(gm)
        return joint(gm, *args, **{**kwargs, "input_device": DEVICE} if takes_device else kwargs)

    def moved_inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        mode = _mode_of(gm)
        found.append(Generated(inputs=[_described(each) for each in inputs]))
        return inner(gm, [_moved(each, mode) for each in inputs], **kwargs)

    def written(self: Any, wrapper_code: Any) -> Any:
        found[-1].code = wrapper_code.value
        return types.SimpleNamespace(call=lambda args: None, __file__="/dev/null", key="", runner=None)

    def post_compile(self: Any, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        set_tracing_context_output_strides(example_inputs, self)  # the backward graph is compiled for these

    with (
        mock.patch.object(compile_fx, "_recursive_joint_graph_passes", moved_joint),
        mock.patch.object(compile_fx, "compile_fx_inner", moved_inner),
        mock.patch.object(graph.GraphLowering, "_compile_to_module_lines", written),
        mock.patch("torch._inductor.output_code.CompiledFxGraph.post_compile", post_compile),
        mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"),
        mock.patch("torch._inductor.fx_passes.pad_mm._should_pad", return_value=False),  # it would time both
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        config.patch({"fx_graph_cache": False, "triton.autotune_at_compile_time": False, "compile_threads": 1}),
    ):
        yield
