"""AdamW on gradients that are projected to a low rank, for the weights that stay dense: GaLore (arXiv 2403.03507)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from slcompile import torch_private
from slcompile.config import require_int, require_number
from slcompile.weight.owners import LiveObjects
from slcompile.weight.structure import FactorizedWeight

OPTIONS = ("rank", "update_every", "scale", "energy")
"""What a group has beside AdamW's options."""


class GaLoreAdamW(AdamW):
    """AdamW whose moments of a matrix are those of its gradient's projection on the leading singular vectors.

    For embeddings and heads beside factorized weights: of a gradient [m, n] with m >= n the moments take ``m * rank``
    numbers instead of ``m * n``, and the projection ``n * rank``. Every ``update_every`` steps the projection is made
    anew, by a singular value decomposition. Projected are matrices with more than ``rank`` rows and columns; all else
    is stepped as AdamW does. So are factors: projecting what has a low rank already is reported to ruin training.

    Args:
        params: As ``torch.optim.AdamW`` takes them. A group may have its own ``rank`` (None: plain AdamW),
            ``update_every``, ``scale`` and ``energy``.
        lr: Learning rate.
        rank: Of the projection, at most.
        update_every: Steps from one projection to the next.
        scale: Factor of projected steps, the method's alpha.
        energy: In (0, 1]: the least rank whose singular vectors hold this share of the gradient's squared norm is
            taken, up to ``rank``, and the moments are carried to the new vectors (AdaRankGrad, arXiv 2410.17881). None:
            always ``rank``, and the moments stay as they are, as in GaLore.
        **kwargs: Of AdamW: ``betas``, ``eps``, ``weight_decay``.

    Raises:
        ValueError: An argument is not allowed, or a group that sets ``rank`` holds factors; in ``step()``, if a matrix
            that is to be projected is sharded or has a sparse gradient, or one with NaN or Inf when its projection is
            made. Nothing is stepped then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int | None = 128,
        update_every: int = 200,
        scale: float = 0.25,
        energy: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._own = {"rank": rank, "update_every": update_every, "scale": scale, "energy": energy}
        self._factors: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a parameter -> whether it is one
        super().__init__(params, lr, **kwargs)
        self._step_supports_amp_scaling = False  # else GradScaler leaves scales and infinities to AdamW's fused kernel

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        asks = param_group.get("rank") is not None
        super().add_param_group({**self._own, **param_group})
        group = self.param_groups[-1]
        try:
            _require_allowed(group)
            if asks and any(self._is_factor(each) for each in group["params"]):
                raise ValueError(
                    f"rank={group['rank']} is set for a group that holds factors: they have a low rank already, and "
                    "projecting their gradients again is reported to ruin training. Give them a group with rank=None"
                )
        except ValueError:
            self.param_groups.pop()
            raise

    @override
    @torch.compiler.disable  # a step as it is: Dynamo can trace neither the search for factors nor counts in states
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        projected = [
            (group, each, each.grad)
            for group in self.param_groups
            for each in group["params"]
            if each.grad is not None and self._is_projected(group, each)
        ]
        for group, parameter, gradient in projected:
            if _is_due(group, self.state.get(parameter, {})) and not bool(gradient.isfinite().all()):
                raise ValueError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} has NaN or Inf, and its singular "
                    "vectors are not found: training has diverged, or needs a GradScaler, which skips such steps"
                )
        for _, parameter, _ in projected:
            parameter.grad = None
        try:
            torch_private.step_without_hooks(AdamW)(self)
        finally:
            for _, parameter, gradient in projected:
                parameter.grad = gradient
        for group, parameter, gradient in projected:
            with torch.autocast(parameter.device.type, enabled=False):
                self._update(group, parameter, gradient)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        every = [each for group in self.param_groups for each in group["params"]]
        own = {"_own": self._own, "are_factors": [self._is_factor(each) for each in every]}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if any(name not in group for group in state["param_groups"] for name in OPTIONS):
            raise ValueError(
                f"state must be that of a GaLoreAdamW, got groups without {', '.join(OPTIONS)}: moments of AdamW are "
                "of whole gradients, and cannot go on as those of projected ones"
            )
        are_factors = state.get("are_factors")  # of a copy: its parameters are others, and modules may not own them yet
        super().__setstate__({name: value for name, value in state.items() if name != "are_factors"})
        if are_factors is not None:
            every = [each for group in self.param_groups for each in group["params"]]
            self._factors = WeakIdKeyDictionary()
            for each, is_factor in zip(every, are_factors, strict=True):
                self._factors[each] = is_factor

    def _is_projected(self, group: dict[str, Any], parameter: Tensor) -> bool:
        if group["rank"] is None or parameter.dim() != 2 or min(parameter.shape) <= group["rank"]:
            return False
        if self._is_factor(parameter):
            return False
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is a {type(parameter.data).__name__}: the singular "
                "vectors of a sharded gradient are not found. Give it a group with rank=None"
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and its singular vectors "
                "are not found. Make the embedding with sparse=False, or give it to torch.optim.SparseAdam"
            )
        return True

    def _is_factor(self, parameter: Tensor) -> bool:
        if parameter not in self._factors:
            every = [each for group in self.param_groups for each in group["params"]]
            owners = LiveObjects.find().owners(every)
            for each in every:
                self._factors[each] = any(isinstance(module, FactorizedWeight) for module, _ in owners[id(each)])
        return bool(self._factors[parameter])

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        is_tall = gradient.shape[0] >= gradient.shape[1]
        # As a tall matrix [m, n]: then its columns are projected, [m, n] @ [n, rank].
        tall, own = (gradient, parameter) if is_tall else (gradient.t(), parameter.t())
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        if _is_due(group, state):
            self._project(group, state, tall)
        projection, mean, square = state["projection"], state["exp_avg"], state["exp_avg_sq"]
        low = tall @ projection
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        mean.lerp_(low, 1 - beta1)
        square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        own.mul_(1 - group["lr"] * group["weight_decay"])
        direction = (mean / (1 - beta1**step)).div_(deviation)
        own.addmm_(direction, projection.t(), alpha=-float(group["lr"]) * group["scale"])

    def _project(self, group: dict[str, Any], state: dict[str, Any], tall: Tensor) -> None:
        """Makes the projection [n, rank] of a gradient [m, n] and, where that rotates, what the moments become."""
        _, strengths, vectors = torch.linalg.svd(tall.float(), full_matrices=False)
        rank = group["rank"]
        if group["energy"] is not None:
            held = strengths.square().cumsum(0)
            rank = min(rank, int((held < group["energy"] * held[-1]).sum()) + 1)
        projection, before = vectors[:rank].t().to(tall.dtype), state.get("projection")
        state["projection"] = projection.contiguous()
        if before is None:
            state["exp_avg"], state["exp_avg_sq"] = (tall.new_zeros(tall.shape[0], rank) for _ in range(2))
        elif group["energy"] is not None:
            turned = before.t() @ projection
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"] @ turned, state["exp_avg_sq"] @ turned.square()


def _is_due(group: dict[str, Any], state: dict[str, Any]) -> bool:
    """Returns whether the next step makes the projection anew."""
    return int(state.get("step", 0)) % group["update_every"] == 0


def _require_allowed(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        if group[name]:
            raise ValueError(f"{name} must be False for GaLoreAdamW, got {group[name]!r}")
    require_int("rank", group["rank"], optional=True)
    require_int("update_every", group["update_every"])
    require_number("scale", group["scale"])
    require_number("energy", group["energy"], 1, optional=True)
