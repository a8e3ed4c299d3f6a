"""Non-zeros that move while a model trains: of the largest support, to where the dense gradient is large.

Each group of a row holds one non-zero, and a move takes it to another entry of its group. RigL (arXiv 1911.11134) drops
entries of the least magnitude and grows those of the largest gradient. Here an entry v gives way to the one of its
group whose gradient g of the dense weight is the largest. With a curvature h of the loss at both, dropping v costs
h v^2 / 2, and the new entry can gain g^2 / (2 h): a move pays where |g| / |v| > h. So groups with the largest ratio
come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from slcompile.config import require_int, require_number
from slcompile.models import unwrapped
from slcompile.ops.support import group_widths, largest_offsets
from slcompile.torch_private import Watching, in_backward, memory_of
from slcompile.weight.owners import LiveObjects, data_parallel_wrappers
from slcompile.weight.sl_weight import SLWeight
from slcompile.weight.structure import FactorizedWeight, weights_in

MOMENTS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "state1", "state2"),
)
"""Names of optimizers' states that are zero at the start, entry by entry, and so may be zero again."""


class SupportMoves:
    """Lets non-zeros of ``support="largest"`` move within their groups, every so many steps.

        moves = slcompile.optim.SupportMoves(model, optimizer, every=100, fraction=0.1)
        for batch in batches:
            loss_of(compiled, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            moves.step(lambda: loss_of(compiled, batch))

    Every ``every`` calls of ``step``, the closure's loss is computed once more and differentiated, in eager mode, and
    the dense gradient of one weight at a time is looked at. Neither composed weights nor dense gradients are kept, and
    no ``grad`` is written; what a forward pass changes, such as BatchNorm's running statistics and the state of random
    numbers, it changes once more. Then moved entries start again: value, gradient and the optimizer's moments are
    zero. All others stay as they are. The compiled graph stays, too: positions are operands. Weights of another
    support do not move, and neither do those that the gradient does not reach, reentrant checkpoints' among them.

    Within DistributedDataParallel all processes call ``step``, and make the moves that the first one's loss asks for.

    Args:
        model: Factorized now or by its first training step; the wrappers of torch.compile and DDP may be around it.
        optimizer: What steps the values: any whose states are of a number for each entry and zero at the start.
        every: Calls of ``step`` from one move to the next.
        fraction: Share of a weight's non-zeros, in (0, 1], that move at most.
        until: The step from which none moves, above ``every``; the fraction falls to zero until then, as a cosine
            does. None: it stays.

    Attributes:
        moved: Non-zeros that moved so far.

    Raises:
        ValueError: An argument is not allowed, or the model is factorized and none of its weights has a support that
            can move.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 100,
        fraction: float = 0.1,
        until: int | None = None,
    ) -> None:
        require_int("every", every)
        require_int("until", until, every + 1, optional=True)
        require_number("fraction", fraction, 1)
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._model, self._optimizer = _inside(model), optimizer
        self.every, self.fraction, self.until = every, fraction, until
        self.moved = self._steps = 0
        if weights_in(self._model):
            self._require_movable()

    def state_dict(self) -> dict[str, int]:
        """Returns what a checkpoint needs: how often ``step`` was called, and what moved."""
        return {"steps": self._steps, "moved": self.moved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes what ``state_dict`` returned; raises ValueError for anything else."""
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise ValueError(f"state must be what SupportMoves.state_dict returned, got {state!r:.200}")
        for name, value in state.items():
            require_int(f"state[{name!r}]", value, 0)
        self._steps, self.moved = state["steps"], state["moved"]

    def step(self, closure: Callable[[], Tensor]) -> int:
        """Counts a step and, where it is time, moves non-zeros; to be called where no backward pass is pending.

        Args:
            closure: Computes a scalar loss, as the training step does, of this step's batch or any other.

        Returns:
            How many non-zeros moved.

        Raises:
            ValueError: No weight can move; values are sharded, or not the optimizer's; its state of a weight cannot be
                reset entry by entry; the model is inside another wrapper than DDP; the loss has no gradient, or none
                that reaches a weight. Nothing has moved then.
        """
        self._steps += 1
        if self._steps % self.every or (self.until is not None and self._steps >= self.until):
            return 0
        weights = self._require_movable()
        states = {name: self._moments(name, weight) for name, weight in weights.items()}
        wrappers = self._require_same_on_all(weights)
        share = self.fraction
        if self.until is not None:
            share *= (1 + math.cos(math.pi * self._steps / self.until)) / 2
        found = self._look(weights, wrappers, closure, share)
        moved = 0
        for name, weight in weights.items():
            move = found.get(name, Move.none(weight))
            if wrappers:
                move = _of_first(move, weight, wrappers[0].process_group)
            weight.move(move.which, move.offsets)
            for each in states[name]:
                each.index_fill_(0, move.which, 0.0)
            moved += len(move.which)
        self.moved += moved
        return moved

    def _require_movable(self) -> dict[str, SLWeight]:
        """Returns the weights whose non-zeros can move, by name."""
        every = [each for each in self._model.named_modules() if isinstance(each[1], FactorizedWeight)]
        if not every:
            raise ValueError("model has no factorized weight: its first training step, or factorize_, makes them")
        found = {name: each for name, each in every if isinstance(each, SLWeight) and each.support == "largest"}
        found = {name: each for name, each in found.items() if each.values.requires_grad}
        if not found:
            name, first = every[0]
            held = f"support={first.support!r}" if isinstance(first, SLWeight) else f"structure={first.structure!r}"
            raise ValueError(
                f"model has no weight whose non-zeros can move: {name} has {held}. Factorize a trained model with "
                "support='largest', and train its values"
            )
        held_by_optimizer = {id(each) for group in self._optimizer.param_groups for each in group["params"]}
        for name, weight in found.items():
            if type(weight.values.data) is not Tensor:
                raise ValueError(
                    f"{name}.values is a {type(weight.values.data).__name__}: a shard of the values has not the dense "
                    "gradient of its groups, and offsets are not sharded with it. Use DistributedDataParallel"
                )
            if id(weight.values) not in held_by_optimizer:
                raise ValueError(f"optimizer does not hold {name}.values, whose moments are to be reset: give that one")
        return found

    def _moments(self, name: str, weight: SLWeight) -> list[Tensor]:
        """Returns what is to be zero where a value is: the optimizer's moments, and the gradient."""
        held: list[Tensor] = [] if weight.values.grad is None else [weight.values.grad]
        for key, state in self._optimizer.state.get(weight.values, {}).items():
            if not isinstance(state, Tensor) or not state.dim():  # of all entries together, such as a count of steps
                continue
            is_by_entry = type(state) is Tensor and state.is_floating_point() and state.shape == weight.values.shape
            if key not in MOMENTS or not is_by_entry:
                raise ValueError(
                    f"{type(self._optimizer).__name__} holds {key} of {name}.values as {type(state).__name__} of "
                    f"{state.dtype}, of which single entries cannot be reset. Give the values to an optimizer of their "
                    "own with 32-bit states, such as torch.optim.AdamW, and that to SupportMoves"
                )
            held.append(state)
        return held

    def _require_same_on_all(self, weights: dict[str, SLWeight]) -> list[Any]:
        """Returns the DDP modules that hold the weights; there are none in one process."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        live = LiveObjects.find()
        wrappers: dict[int, nn.Module] = {}
        for weight in weights.values():
            found = data_parallel_wrappers(live.ancestors(weight))
            other = next((kind for kind, _ in found if kind != "DistributedDataParallel"), None)
            if other is not None or (several and not found):
                inside = f"is inside {other}" if other else "is inside no wrapper, on several processes"
                raise ValueError(
                    f"model {inside}: moves have to be the same on all processes. Use DistributedDataParallel"
                )
            wrappers |= {id(each): each for _, each in found}
        return list(wrappers.values())

    def _look(
        self, weights: dict[str, SLWeight], wrappers: Sequence[Any], closure: Callable[[], Tensor], share: float
    ) -> dict[str, Move]:
        """Differentiates the loss; returns the best moves of each weight that it reaches."""
        looking = _Looking(weights, share)
        with ExitStack() as stack:
            for each in wrappers:
                stack.enter_context(each.no_sync())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled keeps no dense gradient
            stack.enter_context(torch.enable_grad())
            stack.enter_context(Watching(looking.see))
            with saved_tensors_hooks(looking.pack, looking.unpack):
                loss = closure()
            if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
                raise ValueError(f"closure must return a scalar loss that has a gradient, got {loss!r:.200}")
            torch.autograd.grad(loss, [each.values for each in weights.values()], allow_unused=True)
        looking.finish()
        if not looking.found:
            raise ValueError("closure must compute a loss of the model, got one whose gradient reaches no weight of it")
        return looking.found


@dataclass
class Move:
    """Which of a weight's non-zeros move, int64 [moves], and to which offsets in their groups."""

    which: Tensor
    offsets: Tensor

    @classmethod
    def none(cls, weight: SLWeight) -> Move:
        """Makes a move of no entry."""
        nothing = torch.empty(0, dtype=torch.int64, device=weight.values.device)
        return cls(nothing, nothing)


@torch.no_grad()
def best_moves(weight: SLWeight, gradient: Tensor, share: float) -> Move:
    """Returns the moves that promise most.

    Args:
        weight: Of the largest support.
        gradient: Of the dense weight, of its shape.
        share: Of its non-zeros, how many move at most.
    """
    rows, columns = weight.as_matrix
    sizes = gradient.reshape(rows, columns).abs().float()
    index = weight.index.long()
    own = sizes.view(-1)[index]
    others = sizes.view(-1).index_fill(0, index, -1.0).view(rows, columns)
    offsets = largest_offsets(others, weight.groups)
    starts, _ = group_widths(columns, weight.groups, offsets.device)
    best = others.gather(1, offsets + starts).flatten()
    promise = best / weight.values.detach().abs().float()
    is_better = (best > own) & best.isfinite() & own.isfinite()
    promise = promise.masked_fill(~is_better, -1.0)
    most = promise.topk(round(share * len(promise)))
    which = most.indices[most.values > 0]
    return Move(which, offsets.flatten()[which])


class _Looking:
    """Watches weights while a loss is differentiated in eager mode: when they are composed, and their gradients arrive.

    Attributes:
        found: The best moves, by the weight's name.
    """

    def __init__(self, weights: dict[str, SLWeight], share: float) -> None:
        self.found: dict[str, Move] = {}
        self._share = share
        self._weights = {each.values.data_ptr(): (name, each) for name, each in weights.items()}
        self._reads = dict.fromkeys(weights, 0)
        self._sums: dict[str, tuple[int, Tensor]] = {}  # of weights that are read more than once
        self._composed: dict[Hashable, tuple[SLWeight, torch.dtype]] = {}

    def see(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Takes note of an op; ``Watching`` calls it."""
        if name == "compose" and (held := self._weights.get(args[2].data_ptr())):
            self._composed[memory_of(result)] = held[1], result.dtype
            if not in_backward():  # there, a checkpoint is computed again
                self._reads[held[0]] += 1
        elif name == "_to_copy" and (whole := self._composed.get(memory_of(args[0]))):
            is_in_order = result.stride() == args[0].stride()  # not so of a copy in another memory format
            if is_in_order and result.numel() == math.prod(whole[0].shape):
                self._composed[memory_of(result)] = whole[0], result.dtype
        elif name == "compose_backward" and (held := self._weights.get(args[3].data_ptr())):
            self._arrived(*held, args[0])

    def _arrived(self, name: str, weight: SLWeight, gradient: Tensor) -> None:
        count, total = self._sums.pop(name, (0, None))
        total = gradient if total is None else total + gradient
        if count + 1 < self._reads[name]:
            self._sums[name] = count + 1, total
        else:
            self.found[name] = best_moves(weight, total, self._share)

    def finish(self) -> None:
        """Takes weights that were read more often than gradients came."""
        weights = dict(self._weights.values())
        for name, (_, total) in self._sums.items():
            self.found[name] = best_moves(weights[name], total, self._share)

    def pack(self, tensor: Tensor) -> Any:
        """Saves for the backward pass how to compose a weight, in its place."""
        held = None if tensor._version else self._composed.get(memory_of(tensor))  # nobody has written to it
        return tensor if held is None else (*held, tensor.shape, tensor.stride(), tensor.storage_offset())

    @torch.no_grad()
    def unpack(self, packed: Any) -> Tensor:
        """Composes it again."""
        if isinstance(packed, Tensor):
            return packed
        weight, dtype, size, stride, offset = packed
        return weight().to(dtype).as_strided(size, stride, offset)


def _of_first(move: Move, weight: SLWeight, group: Any) -> Move:
    """Returns the first process's moves."""
    before = weight.offsets.to(torch.int32)
    after = before.index_copy(0, move.which, move.offsets.to(torch.int32))
    dist.broadcast(after, group=group, group_src=0)
    which = (after != before).nonzero().squeeze(1)
    return Move(which, after[which].to(torch.int64))


def _inside(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers of torch.compile and DDP, in whatever order they are."""
    model = unwrapped(model)
    return _inside(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model
