"""What a training step finds allocated: the parameters, buffers and optimizer states of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from slcompile.weight.structure import FactorizedWeight


def held_bytes(
    roots: Sequence[nn.Module], optimizers: Iterable[Optimizer], replaced: Mapping[int, FactorizedWeight]
) -> int:
    """Returns the bytes of models' parameters and buffers, and of the states of what is trained.

    A state that is there is counted as it is, without counters of steps. One that is still to come, as before the first
    step, is taken to be that of SGD where the optimizer is SGD's, and else, also where no optimizer is found, Adam's
    two moments.

    Args:
        roots: The models.
        optimizers: All live ones.
        replaced: id of each dense weight that is to be factorized -> its factors, perhaps on the meta device.
    """
    copies: dict[int, int] = {}  # id of a parameter -> copies of it in the state to come
    states: dict[int, int] = {}  # id of a parameter -> bytes of the state that there is
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            moments = (1 if group["momentum"] else 0) if isinstance(optimizer, SGD) else 2
            for parameter in group["params"]:
                copies[id(parameter)] = moments
                kept = [each for each in optimizer.state.get(parameter, {}).values() if isinstance(each, Tensor)]
                states[id(parameter)] = sum(each.nbytes for each in kept if each.dim())
    parameters = {id(each): each for root in roots for each in root.parameters()}
    buffers = {id(each): each for root in roots for each in root.buffers()}
    total = sum(each.nbytes for each in buffers.values())
    for key, parameter in parameters.items():
        moments = copies.get(key, 2)
        weight = replaced.get(key)
        if weight is not None:
            trained = [each.nbytes for each in weight.parameters() if each.requires_grad]
            total += sum(each.nbytes for each in (*weight.parameters(), *weight.buffers())) + moments * sum(trained)
        else:
            state = moments * parameter.nbytes if parameter.requires_grad else 0
            total += parameter.nbytes + (states.get(key, 0) or state)
    return total
