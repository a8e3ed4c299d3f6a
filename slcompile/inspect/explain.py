"""``explain``: what ``backend="sltrain"`` would do to a model, found by tracing alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import SLConfig, checked_config
from slcompile.inspect.collect import Collector, factorized_already
from slcompile.inspect.explanation import Explanation
from slcompile.inspect.not_captured import first_line, not_captured
from slcompile.inspect.rows import ADAM, Break, Change, Summary
from slcompile.inspect.snapshot import source_line
from slcompile.models import positional, random_state_restored, unwrapped
from slcompile.weight.placing import base_class, dense_names
from slcompile.weight.structure import weights_in


def explain(
    model: nn.Module,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    config: SLConfig | None = None,
) -> Explanation:
    """Traces a model as ``backend="sltrain"`` would in its next training step, and says what is rewritten and why.

    Dynamo captures the model, our passes and AOTAutograd run on the graphs, and nothing is compiled or computed:
    captured graphs return zeros, so that the code after a graph break is seen too. (Code that Dynamo does not capture
    runs as it is.) Weights are not read: a model on the meta device is explained as it would be on this machine's
    accelerator, or on its CPU where it has none. Inductor's own passes are not run.

    Args:
        model: Is not changed: its buffers, its modules' attributes and the random state are put back. It may be
            factorized already; then "before" is what it would be dense.
        args, kwargs: What it is called with.
        config: Defaults to ``SLConfig()``; of a model that is factorized already only ``lowering`` and the like count.

    Raises:
        ValueError: ``model``, ``args`` or ``config`` is of another type, or a pattern matches nothing.
        Exception: Whatever calling the model raises.
    """
    config = checked_config(config)
    model = unwrapped(model)
    config.require_patterns_match(dense_names(model))
    call = positional(args)
    collector = Collector(model, config)
    try:
        with (
            _left_as_it_is(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch_private.unlimited_recompiles(),
            torch_private.collector_paused(),
            torch_private.skipped_frames() as skipped,
        ):
            # Dynamo would take the sizes of another model that was explained before for earlier ones of this.
            torch.compile(lambda: model(*call, **(kwargs or {})), backend=collector, dynamic=False)()
        rows = [*collector.rows(), *not_captured(model, collector.without_matmul(), skipped)]
        breaks = [
            *collector.breaks,
            *(Break(first_line(each.reason), source_line(each.stack_trace)) for each in skipped),
        ]
        changes = [(each.parameters, each.bytes, True) for each in collector.weights.values() if each.is_dense]
        changes += [(each.parameters, each.bytes, False) for each in map(factorized_already, weights_in(model))]
        return Explanation(
            base_class(model).__name__,
            {"slcompile": version("slcompile"), "torch": torch.__version__},
            config.to_options(),
            Summary(
                sum(row.decision == "replaced" for row in rows),
                len(rows),
                _total(_numel(model), [(each, dense) for each, _, dense in changes]),
                _total(_training_bytes(model), [(each, dense) for _, each, dense in changes]),
                Change(sum(row.flops.before for row in rows), sum(row.flops.after for row in rows)),
            ),
            tuple(rows),
            tuple(collector.passes),
            tuple(dict.fromkeys(breaks)),  # what is skipped broke the graph of its caller before
            tuple(collector.graphs),
        )
    finally:
        vars(collector).clear()  # Dynamo holds every backend, which must hold neither weights nor graphs


def _total(now: float, changes: Iterable[tuple[Change, bool]]) -> Change:
    """Returns a number of the whole model, from what it is now and how it changes with each weight.

    Args:
        now: Of the model as it is.
        changes: Of each weight, and whether the model still holds it dense.
    """
    before = after = now
    for change, is_dense in changes:
        if is_dense:
            after += change.after - change.before
        else:
            before += change.before - change.after
    return Change(before, after)


def _numel(model: nn.Module) -> int:
    """Counts all parameters as they are."""
    held = sum(each.numel() for each in model.parameters())
    return held + sum(each.numel() - sum(part.numel() for part in each.parameters()) for each in weights_in(model))


def _training_bytes(model: nn.Module) -> int:
    """Counts all parameters as they are, their gradients and Adam's states, and what composes weights."""
    supports = [each for weight in weights_in(model) for each in weight.buffers()]
    return sum(each.nbytes for each in supports) + sum(
        each.nbytes * (ADAM if each.requires_grad else 1) for each in model.parameters()
    )


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Puts back what running a model's Python code may change: attributes, buffers and the random state."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    tables = [
        (table, dict(table))
        for module in model.modules()
        for table in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    try:
        with random_state_restored(model):
            yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)
