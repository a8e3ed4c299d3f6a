"""Per-layer updates under DistributedDataParallel: a bucket's parameters are updated once it was averaged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from slcompile import torch_private


class Buckets:
    """A communication hook of DDP: averages a bucket as DDP does, to the bit, and hands its gradients on.

    A bucket is handed on when the next one is ready, so that its reduction overlaps with the backward pass between
    them; the last ones at the end of the pass. All of it happens in the thread of the backward pass.

    Args:
        wrapper: The DDP module.
        arrived: Called with each parameter, whose ``grad`` then is the average over all processes.
    """

    def __init__(self, wrapper: nn.parallel.DistributedDataParallel, arrived: Callable[[nn.Parameter], None]) -> None:
        self.__name__ = self.__qualname__ = type(self).__name__  # DDP logs a hook's name
        self._wrapper, self._arrived = weakref.ref(wrapper), arrived
        self._waiting: list[tuple[Future, list[nn.Parameter], list[Tensor]]] = []

    # Without annotations: DDP compares them with types, and here they are strings.
    def __call__(self, state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Averages a bucket; returns the future of its buffer."""
        wrapper = self._wrapper()
        assert wrapper is not None, "DDP calls its hooks while it lives"
        if bucket.index() == 0:
            self._waiting.clear()  # of a pass that failed
            torch_private.after_backward(self.finish)
        self.finish()
        buffer = bucket.buffer()
        buffer.mul_(1 / dist.get_world_size(wrapper.process_group))
        work: Any = dist.all_reduce(buffer, group=wrapper.process_group, async_op=True)
        future = work.get_future().then(lambda done: done.value()[0])
        self._waiting.append((future, bucket.parameters(), bucket.gradients()))
        return future

    def finish(self) -> None:
        """Waits for the buckets that are being averaged, and hands their gradients on."""
        while self._waiting:
            future, parameters, gradients = self._waiting.pop(0)
            future.wait()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif parameter.grad.data_ptr() != gradient.data_ptr():
                    parameter.grad.copy_(gradient)
                self._arrived(parameter)


def are_watched(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Returns whether a DDP module hands on the gradients of its buckets."""
    return any(isinstance(each, Buckets) for each in torch_private.bucket_hooks(wrapper))


def watch_buckets(wrapper: nn.parallel.DistributedDataParallel, arrived: Callable[[nn.Parameter], None]) -> None:
    """Lets a DDP module hand on the gradients of each bucket, once for all optimizers.

    Raises:
        ValueError: The module has another communication hook, or looks for parameters that a step does not use.
    """
    hooks = torch_private.bucket_hooks(wrapper)
    if hooks:
        raise ValueError(
            "per-layer updates need the communication hook of DistributedDataParallel, which has "
            f"{getattr(hooks[0], '__name__', type(hooks[0]).__name__)} already and takes one"
        )
    if wrapper.find_unused_parameters:
        raise ValueError(
            "per-layer updates need DistributedDataParallel(find_unused_parameters=False): which parameters no process "
            "used is known only after the backward pass, and until then their gradients are zeros"
        )
    wrapper.register_comm_hook(None, Buckets(wrapper, arrived))
    torch_private.leave_gradients_in_buckets(wrapper)
