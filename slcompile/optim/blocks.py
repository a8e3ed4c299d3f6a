"""AdamW on a few parameters at a time, those whose gradients are largest: BlockLLM (arXiv 2406.17296)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from typing_extensions import override

from slcompile import torch_private
from slcompile.config import require_int, require_number
from slcompile.optim.step_limit import whole_norm


class BlockAdamW(AdamW):
    """AdamW that steps a share of the parameters, and holds moments of those alone.

    Every ``update_every`` steps it chooses anew: the matrices with the largest gradients, by their norm divided by the
    root of their size, and by how often each was chosen, until they hold ``share`` of all elements. Of sharded ones all
    processes choose the same, by the norm of the whole gradient. Vectors (biases, norms) are stepped always. Moments of
    a matrix that is chosen no more are dropped. A matrix without a gradient at that moment, as an expert that no token
    reached, counts as one whose gradient is zero: it is chosen where there is room after the others. Where no matrix
    has a gradient, the choice is put off to the next step. Frozen ones do not count. Choosing needs all gradients at
    once, so ``per_layer`` refuses it; it reads their norms from the device once.

    Args:
        params: As ``torch.optim.AdamW`` takes them, factors among them.
        lr: Learning rate.
        share: Of the elements of all matrices, in (0, 1]; one matrix at least is stepped.
        update_every: Steps from one choice to the next.
        **kwargs: Of AdamW.

    Raises:
        ValueError: ``share`` or ``update_every`` is not allowed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        share: float = 0.1,
        update_every: int = 100,
        **kwargs: Any,
    ) -> None:
        require_number("share", share, 1)
        require_int("update_every", update_every)
        self.share, self.update_every = share, update_every
        super().__init__(params, lr, **kwargs)
        self._step_supports_amp_scaling = False  # else GradScaler calls fused steps with infinities, to choose by

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates what is chosen, of the parameters that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        block_step = first.get("block_step", 0)
        if block_step % self.update_every or self._choose():
            first["block_step"] = block_step + 1  # in a group, so that a state dict holds it
        resting: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            chosen = group.get("chosen", ())
            chosen = chosen if len(chosen) == len(group["params"]) else [True] * len(group["params"])
            for parameter, is_chosen in zip(group["params"], chosen, strict=True):
                if not is_chosen and parameter.grad is not None:
                    resting.append((parameter, parameter.grad))
                    parameter.grad = None
        try:
            torch_private.step_without_hooks(AdamW)(self)
        finally:
            for parameter, gradient in resting:
                parameter.grad = gradient
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "share": self.share, "update_every": self.update_every}

    def _choose(self) -> bool:
        """Writes into each group which of its parameters step, and how often each was chosen.

        Returns:
            Whether there was something to choose by, the gradient of a matrix, or nothing to choose among.
        """
        every = [(group, i, each) for group in self.param_groups for i, each in enumerate(group["params"])]
        candidates = [each for each in every if each[2].dim() >= 2 and each[2].requires_grad]
        if candidates and all(each[2].grad is None for each in candidates):
            return False
        for group in self.param_groups:
            size = len(group["params"])
            if len(group.get("times_chosen", ())) != size:  # at first, or weights became factors
                group["times_chosen"] = [0] * size
            group["chosen"] = [parameter.dim() < 2 for parameter in group["params"]]
        by_merit = sorted(
            zip(_norms([each for _, _, each in candidates]), candidates, strict=True),
            key=lambda pair: -pair[0] / (1 + pair[1][0]["times_chosen"][pair[1][1]]),
        )
        room = self.share * sum(each.numel() for _, _, each in candidates)
        taken = 0
        for _, (group, i, parameter) in by_merit:
            if taken and taken + parameter.numel() > room:
                continue  # a smaller one may still fit
            taken += parameter.numel()
            group["chosen"][i] = True
            group["times_chosen"][i] += 1
        for group, i, parameter in candidates:
            if not group["chosen"][i]:
                self.state.pop(parameter, None)
        return True


def _norms(matrices: list[Tensor]) -> list[float]:
    """Returns the norms of their gradients, divided by the roots of their sizes; 0 where there is no gradient."""
    found = [whole_norm(each.grad).float() / math.sqrt(each.numel()) for each in matrices if each.grad is not None]
    norms = iter(torch.stack(found).tolist() if found else ())
    return [0.0 if each.grad is None else next(norms) for each in matrices]
