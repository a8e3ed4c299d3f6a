"""Training with less: an optimizer that updates each parameter inside the backward pass and frees its gradient."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from slcompile import torch_private
from slcompile.weight.marks import require_steppable
from slcompile.weight.owners import LiveObjects, wrapper_of


def per_layer(
    optimizer_cls: type[Optimizer],
    params_or_groups: Iterable[Any],
    *,
    max_grad_norm: float | None = None,
    **kwargs: Any,
) -> PerLayer:
    """Makes an optimizer that updates each parameter as soon as its gradient is there, and frees the gradient.

    It is an instance of ``optimizer_cls`` in every respect but the time of its updates: groups, state, state dict and
    schedulers are those of that class, and so are the numbers, bit for bit. The training loop stays as it is:
    ``step()`` ends a step, and raises where something was not updated in the backward pass. What differs:

    - The learning rate must be set before ``backward()``; gradients are gone after it.
    - Clipping is per parameter. ``clip_grad_norm_`` over a model finds no gradients.
    - A backward pass is a step. Accumulating gradients over several, closures, GradScaler and models inside DDP, FSDP
      or DataParallel are refused. Wrappers and closures are noticed before anything is updated; accumulation in the
      second backward pass and GradScaler in its first ``step()``, when one update was made with what the first brought.
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
        **kwargs: For ``optimizer_cls``.

    Raises:
        ValueError: The class needs all parameters at once, ``max_grad_norm`` is not positive, a parameter already has
            a gradient or another per-layer optimizer.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ValueError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    if issubclass(optimizer_cls, PerLayer):
        raise ValueError(f"optimizer_cls got {optimizer_cls.__name__}, which is per layer already")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer_cls got {optimizer_cls.__name__}, which needs a closure: it steps all at once")
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm must be a positive number or None, got {max_grad_norm!r}")
    plain: Any = optimizer_cls  # mypy takes an unbound __hash__ for the class's own
    optimizer = _per_layer_class(plain)(params_or_groups, **kwargs)
    optimizer.max_grad_norm = max_grad_norm
    optimizer.watch()
    return optimizer


class Update:
    """The hook that a per-layer optimizer puts on its parameters; without effect once the optimizer is gone."""

    def __init__(self, optimizer: PerLayer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, parameter: Tensor) -> None:
        """Updates a parameter whose gradient is whole."""
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.update(parameter)


class PerLayer(Optimizer):
    """What ``per_layer`` adds to an optimizer class, by inheriting from both."""

    plain: type[Optimizer]
    """The class whose update is used."""

    max_grad_norm: float | None
    _step_supports_amp_scaling = True  # GradScaler then calls step(), which says what is wrong, as no scaler would

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        self._hook = Update(self)
        self._handles: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> of the hook on it
        self._group_of: dict[int, int] = {}  # id of a parameter -> position of its group
        self._updated: set[int] = set()  # ids of those updated since the last step()
        self._alone = True  # False: whether a wrapper holds the parameters is to be found out
        self._made = False
        super().__init__(params, **kwargs)
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
            self._alone = False
        self._group_of = group_of
        self._updated &= group_of.keys()

    def update(self, parameter: Tensor) -> None:
        """Updates one parameter with its gradient, and frees the gradient.

        Raises:
            RuntimeError: It was updated already since the last ``step()``, or a wrapper averages its gradients later.
            ValueError: The optimizer's class keeps something for all parameters together.
        """
        if not self._alone:
            self._require_alone()
        if id(parameter) in self._updated:
            raise RuntimeError(
                f"{type(self).__name__} got a second gradient of a parameter of shape {tuple(parameter.shape)} since "
                "its last step(): call step() after each backward(). It cannot accumulate gradients, over several "
                "backward passes or over several reentrant checkpoints that share a parameter"
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        groups = self.param_groups
        group = groups[self._group_of[id(parameter)]]
        alone = {**group, "params": [parameter]}
        self.param_groups = [alone]
        try:
            torch_private.step_without_hooks(self.plain)(self)
        finally:
            self.param_groups = groups
        written = [key for key in alone if key != "params" and alone[key] is not group.get(key)]
        if written:
            raise ValueError(
                f"{self.plain.__name__} cannot be used per layer: its step() writes {', '.join(written)} of a group, "
                "for all its parameters together"
            )
        parameter.grad = None
        self._updated.add(id(parameter))

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch's overloads return a loss, which a step without a closure has not
        """Ends a step: every parameter was updated in the backward pass.

        One that was frozen when it was given, and has a gradient now, is updated here, from the next step on in the
        backward pass.

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
        left = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        for parameter, group in left:
            if parameter in self._handles:
                raise RuntimeError(
                    f"{type(self).__name__}.step() found the gradient of a parameter of shape "
                    f"{tuple(parameter.shape)} that no backward pass brought: set by hand, or by a pass that failed. "
                    "Call zero_grad() to discard it"
                )
            self._group_of[id(parameter)] = group
            self.update(parameter)
        self.watch()
        self._updated.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its hooks are on these parameters; use state_dict()"
        )

    def _require_alone(self) -> None:
        """Raises RuntimeError where a wrapper combines the gradients of several processes after the hooks have run."""
        live = LiveObjects.find()
        parameters = list(self._handles)
        owners = live.owners(parameters)
        for parameter in parameters:
            for module, name in owners[id(parameter)]:
                wrapper = wrapper_of(live.ancestors(module), parameter)
                if wrapper is not None:
                    raise RuntimeError(
                        f"{type(self).__name__} cannot update {name} of {type(module).__name__} inside {wrapper}: "
                        "gradients are combined across processes only after each was accumulated"
                    )
        self._alone = True


@functools.cache
def _per_layer_class(plain: type[Optimizer]) -> type[PerLayer]:
    """Returns one class for each optimizer class, named after it."""
    members = {"plain": plain, "__doc__": plain.__doc__, "__module__": __name__}
    return type(f"PerLayer{plain.__name__}", (PerLayer, plain), members)
