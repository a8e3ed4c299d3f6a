"""How a model uses its parameters, read from the graphs that Dynamo captures of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from slcompile import torch_private
from slcompile.config import SLConfig
from slcompile.models import buffers_restored, layers_as_in_training, positional
from slcompile.names import plain_name, qualified
from slcompile.ops import WEIGHT_OPS
from slcompile.passes.find_matmuls import GROUPED, TRANSPOSED, WeightUse, find_matmuls, is_weight
from slcompile.weight.placing import base_class
from slcompile.weight.structure import matrix_shape

# They read a matrix in ATen as they do in the captured graph.
_PLAIN = {functional.embedding, functional.linear, operator.matmul, torch.addmm, torch.matmul, torch.mm}


def weight_uses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, WeightUse]:
    """Returns position of each weight among a Dynamo graph's inputs -> how the graph uses it, seen in ATen.

    Factors of weights that are already factorized are not among them.
    """
    positions = [index for index, value in enumerate(example_inputs) if is_weight(value)]
    if not positions:
        return {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not all(_reads_are_plain(placeholders[index], example_inputs[index]) for index in positions):
        lowered = torch_private.lower_to_aten(gm, torch_private.captured_inputs(gm))
        placeholders = lowered.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(example_inputs), (len(placeholders), len(example_inputs))
    uses = {index: find_matmuls(placeholders[index]) for index in positions}
    read_with_grad = _read_with_grad(gm)
    for index, use in uses.items():
        use.without_grad = index not in read_with_grad
    return {index: use for index, use in uses.items() if not use.composed}


def _reads_are_plain(placeholder: fx.Node, weight: nn.Parameter) -> bool:
    """Says whether the captured graph shows how it reads a weight: tracing to ATen takes a fifth of capturing."""
    is_matrix = type(weight) is nn.Parameter and weight.dim() == 2
    return is_matrix and all(user.target in _PLAIN or user.target in WEIGHT_OPS for user in placeholder.users)


def _read_with_grad(gm: fx.GraphModule) -> set[int]:
    """Returns positions of the inputs that something reads while gradients are enabled."""
    enabled, found = True, set()
    positions: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            positions[node] = len(positions)
        elif torch_private.sets_grad_mode(node):
            enabled = bool(node.args[0])
        elif enabled:
            found |= {positions[each] for each in node.all_input_nodes if each in positions}
    return found


def uses_of(
    model: nn.Module,
    config: SLConfig,
    example_args: Sequence[Any] | Tensor | None,
    example_kwargs: Mapping[str, Any] | None,
) -> list[tuple[nn.Parameter, WeightUse]]:
    """Collects how a model uses its weights: on its graph, or where it has no example, by the types of its modules."""
    if example_args is None and example_kwargs is None:
        return uses_by_module_type(model, config)
    args = positional(() if example_args is None else example_args, "example_args")
    return captured_uses(model, [(args, dict(example_kwargs or {}))])


def unread_layers(model: nn.Module, config: SLConfig, uses: Iterable[tuple[nn.Parameter, WeightUse]]) -> list[str]:
    """Names the weights of layers that no captured graph reads: they run in Python, or in other calls of the model."""
    read = {id(weight) for weight, _ in uses}
    return [
        name
        for path, module, use in weight_modules(model)
        if use.matmuls
        and (weight := module._parameters.get("weight")) is not None
        and id(weight) not in read
        and config.includes(name := qualified(path, "weight"))
        and min(matrix_shape(weight.shape, use.convolved)) >= config.min_dim
    ]


@torch.no_grad()
def captured_uses(
    model: nn.Module, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
) -> list[tuple[nn.Parameter, WeightUse]]:
    """Calls a model, without gradients, and collects how each of its weights is used in all captured graphs.

    Buffers and the random state are put back afterwards. Of calls with other arguments, only graphs that are others are
    captured anew.
    """
    found: dict[int, tuple[nn.Parameter, WeightUse]] = {}

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for index, use in weight_uses(gm, example_inputs).items():
            use.without_grad = False  # the whole capture runs without gradients, which tells nothing of training
            parameter = example_inputs[index]
            if id(parameter) in found:
                found[id(parameter)][1].add(use)
            else:
                found[id(parameter)] = (parameter, use)
        return gm.forward

    try:
        with (
            buffers_restored(model),
            layers_as_in_training(),
            torch.random.fork_rng(enabled=not any(each.is_meta for each in model.parameters())),
            # Another backend each time, so that it is called and no graph of an earlier capture is reused.
            torch_private.unlimited_recompiles(),
            torch_private.capturing_rnns(),
        ):
            compiled = torch.compile(lambda args, kwargs: model(*args, **kwargs), backend=collect)
            for args, kwargs in calls:
                compiled(args, kwargs)
        return list(found.values())
    finally:
        found.clear()  # Dynamo's cache holds the backend, which must not hold the dense weights


def layer_use(module: nn.Module) -> WeightUse | None:
    """Returns how nn.Linear, transformers' Conv1D or a convolution uses its ``weight``; None for any other module."""
    kind = base_class(module)
    if isinstance(module, nn.Linear):
        return WeightUse(matmuls=["linear"])
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return WeightUse(matmuls=["linear"], input_dim=0)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return WeightUse(others=[TRANSPOSED])
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups > 1:
            return WeightUse(others=[GROUPED.format(module.groups)])
        return WeightUse(matmuls=["convolution"], convolved=True)
    return None


def weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightUse]]:
    """Yields path, module and use of the weight of every layer that ``layer_use`` knows."""
    for path, module in model.named_modules():
        if (use := layer_use(module)) is not None:
            yield plain_name(path), module, use


def uses_by_module_type(model: nn.Module, config: SLConfig) -> list[tuple[nn.Parameter, WeightUse]]:
    """Collects the weights of a model's linear and convolution layers, without its graph.

    A convolution's weight that carries a parametrization is left out: it is computed before it is used.

    Raises:
        ValueError: One that the patterns include is of a scripted module, or of a linear layer and carries a
            parametrization.
    """
    for path, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and is_weight(getattr(module, "weight", None))
        name = plain_name(qualified(path, "weight"))
        if scripted and config.includes(name):
            raise ValueError(f"{name} is of a scripted module and cannot be factorized; exclude it, or script later")
    uses: dict[int, tuple[nn.Parameter, WeightUse]] = {}
    for path, module, use in weight_modules(model):
        weight = module._parameters.get("weight")
        if weight is None:
            name = qualified(path, "weight")
            is_parametrized = nn.utils.parametrize.is_parametrized(module, "weight")
            if is_parametrized and use.matmuls == ["linear"] and config.includes(name):
                raise ValueError(f"{name} carries a parametrization; remove it, or exclude the weight")
            continue  # already factorized, or not a parameter
        if id(weight) in uses:
            uses[id(weight)][1].add(use)
        else:
            uses[id(weight)] = weight, use
    return list(uses.values())
