"""Training with less: an optimizer that updates each parameter inside the backward pass and frees its gradient."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from slcompile import torch_private
from slcompile.config import require_int, require_number
from slcompile.optim.buckets import are_watched, watch_buckets
from slcompile.weight.marks import require_steppable
from slcompile.weight.owners import LiveObjects, data_parallel_wrappers


def per_layer(
    optimizer_cls: type[Optimizer],
    params_or_groups: Iterable[Any],
    *,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
    **kwargs: Any,
) -> PerLayer:
    """Makes an optimizer that updates each parameter as soon as its gradient is there, and frees the gradient.

    It is an instance of ``optimizer_cls`` in every respect but the time of its updates: groups, state, state dict and
    schedulers are those of that class, and so are the numbers, bit for bit. The training loop stays as it is:
    ``step()`` ends a step, and raises where something was not updated in the backward pass. What differs:

    - The learning rate must be set before ``backward()``; gradients are gone after it. What a step does not reach is
      left as it is, also with ``zero_grad(set_to_none=False)``, after which a plain optimizer steps it with zeros.
    - A parameter is updated once all its gradients came. A checkpoint that reads it detached, and is recomputed later
      in the same pass, sees it updated.
    - A backward pass that fails may have updated some parameters. ``zero_grad()`` and ``step()`` end what it began.
    - Clipping is per parameter. ``clip_grad_norm_`` over a model finds no gradients.
    - With ``accumulate=k``, the gradients of the first k - 1 backward passes are added up as ever, and the k-th pass
      updates. More than k passes before a ``step()`` are refused, in the first one too many, when an update was made
      with what k of them brought. After fewer, ``step()`` updates with what is there.
    - Under FSDP2 (``fully_shard``) a shard is updated after its reduce-scatter, and under DistributedDataParallel a
      bucket's parameters after its all-reduce. Passes in which the processes do not exchange gradients (``no_sync()``,
      ``set_requires_gradient_sync(False)``) do not count among the k. Wrap or shard the model before you make the
      optimizer. DDP's own buckets hold a whole set of gradients: only the second one, in ``grad``, is saved.
    - Closures, GradScaler, FullyShardedDataParallel (the first FSDP), DataParallel, communication hooks of DDP and its
      ``find_unused_parameters`` are refused: GradScaler in its first ``step()``, the others before anything is updated.
    - A compiled graph returns the gradients of all its parameters at once. To free them layer by layer, compile layer
      by layer: ``for layer in layers: layer.compile(backend="sltrain")``.
    - Hooks registered on the optimizer's ``step`` run once a step, after all updates.

    Args:
        optimizer_cls: Any class that treats each parameter by itself: torch's (but LBFGS), torchao's, bitsandbytes'.
            Of bitsandbytes' ``GlobalOptimManager``, ``override_config`` works and ``register_parameters`` does not: it
            goes by positions in a group.
        params_or_groups: As ``optimizer_cls`` takes them. May be dense weights that the first training step of
            ``backend="sltrain"`` turns into factors: those are adopted.
        max_grad_norm: Each parameter's gradient is scaled down to this 2-norm; None: no clipping.
        accumulate: Backward passes in a step.
        **kwargs: For ``optimizer_cls``.

    Raises:
        ValueError: The class needs all parameters at once, ``max_grad_norm`` or ``accumulate`` is not positive, a
            parameter already has a gradient or another per-layer optimizer, it is inside a wrapper that is refused, or
            it is sharded and the class is one of bitsandbytes'.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ValueError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    if issubclass(optimizer_cls, PerLayer):
        raise ValueError(f"optimizer_cls got {optimizer_cls.__name__}, which is per layer already")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer_cls got {optimizer_cls.__name__}, which needs a closure: it steps all at once")
    require_number("max_grad_norm", max_grad_norm, optional=True)
    require_int("accumulate", accumulate)
    plain: Any = optimizer_cls  # mypy takes an unbound __hash__ for the class's own
    optimizer = _per_layer_class(plain)(params_or_groups, **kwargs)
    optimizer.max_grad_norm, optimizer.accumulate = max_grad_norm, accumulate
    optimizer.watch()
    optimizer.watch_wrappers()
    return optimizer


class Update:
    """The hook that a per-layer optimizer puts on its parameters; without effect once the optimizer is gone."""

    def __init__(self, optimizer: PerLayer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, parameter: Tensor) -> None:
        """Tells the optimizer that a gradient was accumulated: by autograd, or by FSDP2 after its reduce-scatter."""
        optimizer = self.optimizer()
        if optimizer is not None and not optimizer.is_averaged_later(parameter):
            optimizer.arrived(parameter)


def _is_updated(parameter: nn.Parameter) -> bool:
    return any(isinstance(hook, Update) for hook in torch_private.post_accumulate_hooks(parameter))


def _averaged(parameter: nn.Parameter) -> None:
    """Tells a parameter's optimizer that DDP has averaged its gradient."""
    for hook in torch_private.post_accumulate_hooks(parameter):
        optimizer = hook.optimizer() if isinstance(hook, Update) else None
        if optimizer is not None:
            optimizer.arrived(parameter)


class PerLayer(Optimizer):
    """What ``per_layer`` adds to an optimizer class, by inheriting from both."""

    plain: type[Optimizer]
    """The class whose update is used."""

    max_grad_norm: float | None
    accumulate: int

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        self._lock = threading.RLock()  # autograd has a thread for each device, and each calls the hooks of its own
        self._hook = Update(self)
        self._handles: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> of the hook on it
        self._group_of: dict[int, int] = {}  # id of a parameter -> position of its group
        self._updated: set[int] = set()  # ids of those updated since the last step()
        self._passes: dict[int, int] = {}  # id of one not updated yet -> gradients that came since the last step()
        self._averaged_by: dict[int, weakref.ref[nn.Module]] = {}  # id of a parameter -> the DDP module that it is in
        self._wrappers_known = True  # False: which wrappers hold the parameters is to be found out
        self._made = False
        super().__init__(params, **kwargs)
        self._step_supports_amp_scaling = True  # GradScaler then calls step(), which says what is wrong, as none would
        self._made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and watches its parameters; leaves the groups as they were where that is refused."""
        super().add_param_group(param_group)
        if self._made:  # while it is being made, the class's own __init__ is not through
            try:
                self.watch()
            except ValueError:
                self.param_groups.pop()
                raise

    def watch(self) -> None:
        """Brings the hooks up to date with the groups: called when these change, and by every ``step()``.

        Raises:
            ValueError: A parameter has a gradient, or another per-layer optimizer; no hook is changed then.
        """
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        parameters = [p for group in self.param_groups for p in group["params"]]
        new = [p for p in parameters if p.requires_grad and p not in self._handles]
        if new:
            require_steppable(self)
        for parameter in new:
            if type(parameter.data) is not Tensor and self.plain.__module__.startswith("bitsandbytes."):
                raise ValueError(
                    f"{self.plain.__name__} of bitsandbytes cannot update a parameter of shape "
                    f"{tuple(parameter.shape)} that is a {type(parameter.data).__name__}: its kernels read plain "
                    "memory. Take the optimizer of torchao"
                )
            if parameter.grad is not None:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} already has a gradient, to which the next backward "
                    f"pass would add; call zero_grad() before it is given to {type(self).__name__}"
                )
            for hook in torch_private.post_accumulate_hooks(parameter):
                other = hook.optimizer() if isinstance(hook, Update) else None
                if other is not None:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is already updated by another "
                        f"{type(other).__name__}; delete that first"
                    )
        for gone in [p for p in self._handles if id(p) not in group_of]:
            self._handles.pop(gone).remove()
        for parameter in new:
            self._handles[parameter] = parameter.register_post_accumulate_grad_hook(self._hook)
        if new:
            self._wrappers_known = False
        self._group_of = group_of
        self._updated &= group_of.keys()
        for gone_id in self._passes.keys() - group_of.keys():
            del self._passes[gone_id]

    def is_averaged_later(self, parameter: Tensor) -> bool:
        """Returns whether a gradient that autograd has accumulated is yet to be averaged by DDP, which then says so.

        Raises:
            ValueError: A wrapper that is refused holds a parameter.
        """
        with self._lock:
            if not self._wrappers_known:
                self.watch_wrappers()
                self._wrappers_known = True
            wrapper = self._averaged_by.get(id(parameter))
        return wrapper is not None and wrapper() is not None

    def arrived(self, parameter: Tensor) -> None:
        """Counts a gradient, averaged where there are several processes; the last one of a step updates.

        Raises:
            RuntimeError: The parameter was updated already since the last ``step()``.
            ValueError: As ``update``.
        """
        with self._lock:
            if id(parameter) in self._updated:
                raise RuntimeError(
                    f"{type(self).__name__} got more gradients of a parameter of shape {tuple(parameter.shape)} since "
                    f"its last step() than accumulate={self.accumulate}: call step() after so many backward passes, "
                    "and after one that failed. Several reentrant checkpoints that share a parameter bring several in "
                    "one pass"
                )
            self._passes[id(parameter)] = self._passes.get(id(parameter), 0) + 1
            if self._passes[id(parameter)] == self.accumulate:
                self.update(parameter)

    def update(self, parameter: Tensor) -> None:
        """Updates one parameter with its gradient, and frees the gradient.

        Raises:
            ValueError: The optimizer's class keeps something for all parameters together, in a group or as a number.
        """
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        groups = self.param_groups
        group = groups[self._group_of[id(parameter)]]
        alone = {**group, "params": [parameter]}
        self.param_groups, own = [alone], _numbers(self)
        try:
            torch_private.step_without_hooks(self.plain)(self)
        finally:
            self.param_groups = groups
        written = [f"{key} of a group" for key in alone if key != "params" and alone[key] is not group.get(key)]
        written += [f"its attribute {key}" for key, value in _numbers(self).items() if own.get(key) != value]
        if written:
            raise ValueError(
                f"{self.plain.__name__} cannot be used per layer: its step() writes {', '.join(written)}, "
                "for all its parameters together"
            )
        parameter.grad = None
        self._passes.pop(id(parameter), None)
        self._updated.add(id(parameter))

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch's overloads return a loss, which a step without a closure has not
        """Ends a step: every parameter was updated in the backward pass.

        One that was frozen when it was given and has a gradient now, and one that got fewer gradients than
        ``accumulate``, are updated here.

        Raises:
            ValueError: There is a closure.
            RuntimeError: A gradient was left, or set by hand; or a GradScaler scaled them.
        """
        if closure is not None:
            raise ValueError("closure must be None: backward() itself updates, so a step cannot be evaluated again")
        if hasattr(self, "found_inf"):  # set by GradScaler.step() around this call
            raise RuntimeError(
                f"{type(self).__name__} cannot be used with GradScaler: backward() has already updated the parameters "
                "with scaled gradients, and overflows cannot be skipped. Train in bfloat16, which needs no scaler"
            )
        # So a distributed checkpoint makes a new optimizer's state before it loads one: gradients and rates of zero.
        is_start = not self.state and all(float(group.get("lr", 1)) == 0 for group in self.param_groups)
        left = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        for parameter, group in left:
            if parameter in self._handles and id(parameter) not in self._passes and not is_start:
                raise RuntimeError(
                    f"{type(self).__name__}.step() found the gradient of a parameter of shape "
                    f"{tuple(parameter.shape)} that no backward pass brought: set by hand, by a pass that failed, or "
                    "by passes under no_sync() alone. Call zero_grad() to discard it"
                )
            self._group_of[id(parameter)] = group
            self.update(parameter)
        self.watch()
        self._updated.clear()
        self._passes.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards gradients, also those that are being accumulated."""
        super().zero_grad(set_to_none)
        self._passes.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its hooks are on these parameters; use state_dict()"
        )

    def watch_wrappers(self) -> None:
        """Finds the wrappers that combine the gradients of several processes, and what they say when they have.

        Raises:
            ValueError: One of them cannot be waited for.
        """
        live = LiveObjects.find()
        owners = live.owners(self._handles)
        ddp: dict[int, nn.parallel.DistributedDataParallel] = {}
        self._averaged_by.clear()
        for parameter in self._handles:
            for module, name in owners[id(parameter)]:
                for kind, wrapper in data_parallel_wrappers(live.ancestors(module)):
                    if kind == "DistributedDataParallel":
                        ddp[id(wrapper)] = cast(nn.parallel.DistributedDataParallel, wrapper)
                        self._averaged_by[id(parameter)] = weakref.ref(wrapper)
                    elif kind != "FSDPModule":
                        raise ValueError(
                            f"{type(self).__name__} cannot update {name} of {type(module).__name__} inside {kind}: it "
                            "does not say when it has combined a parameter's gradients. Use DistributedDataParallel or "
                            "fully_shard"
                        )
        for each in ddp.values():
            if are_watched(each):
                continue
            trained = [p for p in each.parameters() if p.requires_grad]
            if torch_private.in_backward() and not all(_is_updated(p) for p in trained):
                raise ValueError(
                    f"{type(self).__name__} was made before DistributedDataParallel, of some of its parameters only: "
                    "the reduction of others may have begun. Make it after DistributedDataParallel"
                )
            watch_buckets(each, _averaged)


def _numbers(optimizer: Optimizer) -> dict[str, float]:
    """Returns what an optimizer holds outside of groups and states, such as a count of its steps."""
    return {key: value for key, value in vars(optimizer).items() if type(value) in (int, float)}


@functools.cache
def _per_layer_class(plain: type[Optimizer]) -> type[PerLayer]:
    """Returns one class for each optimizer class, named after it."""
    members = {"plain": plain, "__doc__": plain.__doc__, "__module__": __name__}
    return type(f"PerLayer{plain.__name__}", (PerLayer, plain), members)
