"""A guard against divergence: no step moves a factor by more than a share of its norm."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slcompile.config import require_number
from slcompile.models import unwrapped
from slcompile.optim.in_backward import PerLayer
from slcompile.weight.sl_weight import SLWeight
from slcompile.weight.structure import weights_in

log = logging.getLogger("slcompile")


class StepLimit:
    """What ``limit_steps`` returns: how often it had to act, and the way to end it.

    Attributes:
        limited: Steps of one factor that were shortened so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ratio: float) -> None:
        self.limited = 0
        self._warned_of_no_number = False
        self._model, self._ratio = model, ratio
        self._before: list[tuple[str, nn.Parameter, float, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._shorten),
        )

    def remove(self) -> None:
        """Ends the limit; further steps are as the optimizer makes them."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, *_: Any) -> None:
        self._before.clear()  # of a step that raised
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, weight in self._model.named_modules():
            if isinstance(weight, SLWeight):
                start = 1 / math.sqrt(3 * weight.shape[-2:][weight.input_dim])
                for name in ("B", "A"):
                    factor = getattr(weight, name)
                    if id(factor) in held:
                        least = start * math.sqrt(factor.numel())
                        self._before.append((f"{path}.{name}", factor, least, factor.detach().clone()))

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        for name, factor, least, before in self._before:
            step = factor - before
            size, norm = float(whole_norm(step)), max(float(whole_norm(before)), least)
            if not math.isfinite(size) and not self._warned_of_no_number:
                log.warning("slcompile: a step of %s is no number and is not shortened: training has diverged", name)
                self._warned_of_no_number = True
            elif self._ratio * norm < size < math.inf:
                factor.copy_(before.add_(step, alpha=self._ratio * norm / size))
                if self.limited == 0:
                    log.warning(
                        "slcompile: a step of %s was %.2g of its norm and is shortened to %.2g; the learning rate may "
                        "be too high. Further ones are shortened without a word",
                        name,
                        size / norm,
                        self._ratio,
                    )
                self.limited += 1
        self._before.clear()


def whole_norm(tensor: Any) -> Tensor:
    """Returns the norm of a tensor, of all its shards where it is sharded; ``float`` of a DTensor's is a shard's."""
    norm = tensor.norm()
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def limit_steps(model: nn.Module, optimizer: Optimizer, ratio: float = 0.1) -> StepLimit:
    """Shortens each step of a factor B or A to at most ``ratio`` of the factor's norm.

    Norms are Frobenius norms, of the whole factor where it is sharded; a factor that is smaller than it would be at a
    random start, as the one that starts at zero is, counts as of that size. Other parameters are left alone, and so are
    the optimizer's moments. Each step copies the factors and reads two numbers of each from the device. The first time
    that a step is shortened, it is logged with the factor's name. A step that is NaN or Inf has no length and is left
    as it is; that, too, is logged once.

    Args:
        model: Factorized now or by its first training step; torch.compile's wrapper may be around it.
        optimizer: Any that steps all parameters in ``step()``; accelerate's wrapper may be around it.
        ratio: Above 0.

    Raises:
        ValueError: ``ratio`` is not a positive number, ``optimizer`` is none or updates in the backward pass
            (``slcompile.optim.per_layer``), or the model is factorized and the optimizer holds no factor B or A of it.
    """
    require_number("ratio", ratio)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner  # which steps, and has the hooks around that
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, PerLayer):
        raise ValueError(f"optimizer got {type(optimizer).__name__}, whose updates come before step()")
    inside = unwrapped(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = weights_in(inside)
    factors = [factor for each in weights if isinstance(each, SLWeight) for factor in (each.B, each.A)]
    if weights and not any(id(each) in held for each in factors):
        raise ValueError(f"optimizer must hold factors B and A of the model, got {type(optimizer).__name__} with none")
    return StepLimit(inside, optimizer, ratio)
