"""``torch.compile(model, backend="sltrain")``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from slcompile import torch_private
from slcompile.captured import PARTITIONER, REQUIRED_SETTINGS, CapturedGraph
from slcompile.config import SLConfig, did_you_mean
from slcompile.convert.ledger import ledger

log = logging.getLogger("slcompile")


def sltrain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph for training with sparse-plus-low-rank weights; Dynamo calls this.

    A model that is still dense is converted when the compiled function first runs, from the arguments of that run:
    one compiled graph serves every instance of a class. Only training converts: without gradients, for frozen
    weights and for owners in ``.eval()`` the graph is compiled as it is.

    Args:
        gm, example_inputs: From Dynamo; parameters are among the inputs.
        mode: One of torch.compile's modes, passed to Inductor.
        options: Fields of ``SLConfig``, and ``"inductor"`` for Inductor's settings. Where a model was factorized by
            ``factorize_``, its config says what these leave open of how to compile.
        name: Of the compiled region; torch 2.15 passes it.

    Raises:
        ValueError: Unknown or bad options.
    """
    config, settings = SLConfig.from_options({**ledger.explicit_options(example_inputs), **(options or {})})
    settings = _inductor_settings(mode, settings)
    if config.budget is not None and settings.get(PARTITIONER) is not None:
        raise ValueError(f"memory_budget needs Inductor's {PARTITIONER}, which option 'inductor' sets")
    ledger.warn_of_held_weights()
    graph = CapturedGraph(gm, example_inputs, config, settings)
    if torch.is_grad_enabled():
        log.info("%s", graph.report)
        torch_private.add_artifact("slcompile_matmuls", lambda: json.dumps(graph.report.to_dict()), "json")
        if config.dryrun:
            ledger.note_dry_run(graph.roots, graph.report)
        elif not graph.report.replaced:
            ledger.note_left(graph.roots, graph.report)
    graph.compiled({} if config.dryrun else graph.wanted, example_inputs)
    return graph.run


def _inductor_settings(mode: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    known = torch_private.inductor_settings()
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown Inductor setting {key!r} in option 'inductor'{did_you_mean(key, known)}")
        if key in REQUIRED_SETTINGS and settings[key] is not True:
            raise ValueError(f"{key} in option 'inductor' must be True, as this backend's passes run there")
    if mode is not None and mode != "default":
        modes = torch_private.inductor_modes()
        if mode not in modes:
            raise ValueError(f"mode got {mode!r}{did_you_mean(mode, modes)}")
        settings = {**modes[mode], **settings}
    return settings
