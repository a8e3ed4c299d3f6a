"""SLWeight, the parameters of one factorized weight, and the subclass that puts it in a dense weight's place.

A converted module's class becomes a subclass in which the weight's name is a property that reads the submodule
``<name>_sl``. The subclass is one per (class, names), not one per module as in torch.nn.utils.parametrize: Dynamo
guards on the type, and N equal blocks must share one compiled graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from slcompile import torch_private
from slcompile.config import SLConfig
from slcompile.ops import compose, compose_reference
from slcompile.owners import plain_name
from slcompile.step_hook import mark_values
from slcompile.support import IMPORTED, draw_seed, groups_per_row, uniform_count, uniform_dtype, uniform_index

_ORDER = "_slcompile_order"
"""Attribute of a converted module: name of each factorized weight -> the order of ``_parameters`` with it."""

SUFFIX = "_sl"
"""Name of the submodule beside the weight's; not the weight's own, which get_submodule would resolve to a tensor."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The parts of one factorized weight, ``scale * B @ A + S``; ``index`` is None for the stratified support."""

    B: Tensor
    A: Tensor
    values: Tensor
    seed: int
    index: Tensor | None
    scale: float


class SLWeight(nn.Module):
    """A weight ``W = scale * B @ A + S`` of shape [rows, columns] whose forward is one op, ``compose``.

    Parameters ``B`` [rows, rank], ``A`` [rank, columns], ``values`` ([rows, groups] stratified, [non-zeros]
    uniform); buffers ``seed`` (one int64) and, for the uniform support, ``index`` (int32, sorted). A stack of matrices
    [experts, rows, columns] has stacks of factors; its support is that of one matrix of ``experts * rows`` rows.

    Args:
        shape: Of the weight, as its owner stores it; two or three sizes.
        config: Rank, density, alpha and support.
        name: Fully qualified name; with ``config.seed`` it determines the seed.
        input_dim: Dimension of the matrix that the matmul contracts: 1 for ``nn.Linear`` [out, in], 0 for a
            Conv1D-style [in, out]. The factor at that side is the one that starts random.
        device, dtype: Of the parameters.

    The parameters are uninitialised until ``reset_parameters`` or ``set_factors``.
    """

    op = torch.ops.slcompile.compose.default

    B: nn.Parameter
    A: nn.Parameter
    values: nn.Parameter
    seed: Tensor
    index: Tensor  # of the uniform support only

    def __init__(
        self,
        shape: Sequence[int],
        config: SLConfig,
        *,
        name: str = "",
        input_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.input_dim = tuple(shape), input_dim
        self.density, self.support = config.density, config.support
        *stack, rows, columns = self.shape
        self.rank = config.rank_for(rows, columns)
        self._scale_ratio = (config.alpha / self.rank).as_integer_ratio()
        self.drawn_seed = draw_seed(config.seed, name)
        new = functools.partial(torch.empty, device=device, dtype=dtype)
        self.B = nn.Parameter(new(*stack, rows, self.rank))
        self.A = nn.Parameter(new(*stack, self.rank, columns))
        self.values = nn.Parameter(new(values_shape(self.shape, config)))
        mark_values(self.values)
        self.register_buffer("seed", torch.empty(1, dtype=torch.int64, device=device))
        if self.support == "uniform":
            index_dtype = uniform_dtype(*self.as_matrix)
            self.register_buffer("index", torch.empty(self.values.shape, dtype=index_dtype, device=device))
        self._restore_support()

    @property
    def as_matrix(self) -> tuple[int, int]:
        """Rows, those of a stack one after another, and columns."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def scale(self) -> float:
        """alpha / rank. Kept as a ratio of integers: with dynamic shapes, Dynamo makes floats of modules symbolic."""
        numerator, denominator = self._scale_ratio
        return numerator / denominator

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark_values(self.values)  # copies of a parameter do not carry its marks

    def operands(self) -> dict[str, Tensor]:
        """The tensors that ``op`` takes, in its order, by the names they have in this module."""
        where = "seed" if self.support == "stratified" else "index"
        return {name: getattr(self, name) for name in ("B", "A", "values", where)}

    def op_args(self) -> tuple[Any, ...]:
        """What ``op`` takes after its operands."""
        return (self.scale,)

    def forward(self) -> Tensor:
        """The composed weight, of ``shape``."""
        # Read in the order of ``operands``, so that Dynamo's graph equals the one that was compiled for the conversion.
        B, A, values = self.B, self.A, self.values
        # Of an opaque op, torch.func's transforms have no gradient and forward-mode AD loses the tangent in silence;
        # exporters translate none, and a program that was exported may run where slcompile is not installed.
        is_opaque = not (torch_private.is_transforming() or torch.compiler.is_exporting())
        op = compose if is_opaque else compose_reference
        return op(B, A, values, self.seed if self.support == "stratified" else self.index, self.scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the paper's start and restores the support's buffers.

        The factor that reads the input is Kaiming-uniform(a=sqrt(5)), the other zero, values U(+-1/sqrt(in)).
        """
        fan_in = self.shape[-2:][self.input_dim]
        bound = 1 / math.sqrt(fan_in)
        reading, other = (self.A, self.B) if self.input_dim == 1 else (self.B, self.A)
        reading.uniform_(-bound, bound)
        other.zero_()
        self.values.uniform_(-bound, bound)
        self._restore_support()

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor, values: Tensor) -> None:
        """Copies given factors into the parameters."""
        for parameter, value in ((self.B, B), (self.A, A), (self.values, values)):
            parameter.copy_(value)

    def factors(self) -> Factors:
        """The parameters, detached, sharing memory."""
        self.check_support()
        index = self.index if self.support == "uniform" else None
        return Factors(self.B.detach(), self.A.detach(), self.values.detach(), self.drawn_seed, index, self.scale)

    @torch.no_grad()
    def merged_wide(self) -> Tensor:
        """The dense weight, composed in at least float32 and left in it."""
        self.check_support()
        self.check_whole()
        wide = torch.promote_types(self.B.dtype, torch.float32)
        B, A, values, where = (
            each.detach().to(wide) if each.is_floating_point() else each for each in self.operands().values()
        )
        return compose(B, A, values, where, self.scale)

    def merged(self) -> Tensor:
        """The dense weight in the parameters' dtype, rounded once."""
        return self.merged_wide().to(self.B.dtype)

    def check_whole(self) -> None:
        """Raises RuntimeError where FSDP holds the factors in shards, of which no process can compose the weight."""
        if type(self.B.data) is not Tensor:
            raise RuntimeError(
                "the factors are sharded among processes: get a full state dict (get_model_state_dict with "
                "StateDictOptions(full_state_dict=True, cpu_offload=True)), load it into the factorized model of one "
                "process, and merge that"
            )

    def check_support(self) -> None:
        """Raises RuntimeError where the seed buffer is not the seed that this weight was made or loaded with.

        ``to_empty`` leaves garbage in it and averaging buffers in low precision changes it; either would silently
        move every non-zero.
        """
        if self.seed.device.type != "meta" and int(self.seed) != self.drawn_seed:
            raise RuntimeError(
                f"the seed buffer holds {int(self.seed)} but this weight was drawn with {self.drawn_seed}: something "
                "overwrote it (to_empty without reset_parameters, or arithmetic over buffers). Load a state dict, or "
                "call reset_parameters()."
            )

    def extra_repr(self) -> str:
        return (
            f"{'x'.join(map(str, self.shape))}, rank={self.rank}, density={self.density}, support={self.support}, "
            f"scale={self.scale:.4g}"
        )

    def _restore_support(self) -> None:
        self.seed.fill_(self.drawn_seed)
        if self.support == "uniform" and not self.index.is_meta and self.drawn_seed != IMPORTED:
            self.index.copy_(uniform_index(self.drawn_seed, *self.as_matrix, self.density))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.check_support()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        mark_values(self.values)  # load_state_dict(assign=True) brings another parameter
        if not self.seed.is_meta:
            self.drawn_seed = int(self.seed)


def values_shape(shape: Sequence[int], config: SLConfig) -> tuple[int, ...]:
    """Shape of ``values``: [..., rows, groups] for the stratified support, [non-zeros] for the uniform one."""
    if config.support == "stratified":
        return (*shape[:-1], groups_per_row(shape[-1], config.density))
    return (uniform_count(math.prod(shape[:-1]), shape[-1], config.density),)


@functools.cache
def sl_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base`` in which ``names`` are properties that compose a weight.

    Raises:
        TypeError: ``base`` cannot be subclassed (scripted modules, some metaclasses).
    """

    def refuse(name: str) -> AttributeError:
        return AttributeError(
            f"{base.__name__}.{name} is composed from {name}{SUFFIX} and cannot be assigned; change the factors, or "
            "call slcompile.merge_(model) first to make it a dense parameter again"
        )

    def __setattr__(self, key: str, value: Any) -> None:
        if key in names:
            raise refuse(key)
        base.__setattr__(self, key, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in names:
            raise refuse(name)
        base.register_parameter(self, name, param)

    def reset_parameters(self) -> None:
        weights = [getattr(self, name + SUFFIX) for name in names]
        if hasattr(base, "reset_parameters"):
            with _shapes_only(weights):
                base.reset_parameters(self)  # bias and the like
        for weight in weights:
            weight.reset_parameters()

    def __reduce_ex__(self, protocol):
        make, args, *rest = cast(tuple, base.__reduce_ex__(self, max(protocol, 2)))
        return (_remake, (base, names, make, tuple(base if each is type(self) else each for each in args)), *rest)

    def compose_property(name: str) -> property:
        submodule = name + SUFFIX
        return property(lambda self: getattr(self, submodule)())

    def __new__(cls, *args, **kwargs):
        return base(*args, **kwargs)  # type(module)(...) builds a new, dense one

    members = {
        "__new__": __new__,
        "__setattr__": __setattr__,
        "register_parameter": register_parameter,
        "reset_parameters": reset_parameters,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "sl_base": base,
        **{name: compose_property(name) for name in names},
    }
    return types.new_class(f"SL{base.__name__}", (base,), exec_body=lambda namespace: namespace.update(members))


@contextlib.contextmanager
def _shapes_only(weights: Sequence[SLWeight]) -> Iterator[None]:
    """Within, these weights read as tensors on the meta device: what is drawn for them is discarded, not composed."""
    for weight in weights:
        vars(weight)["forward"] = functools.partial(torch.empty, weight.shape, device="meta")
    try:
        yield
    finally:
        for weight in weights:
            del vars(weight)["forward"]


def _remake(base: Any, names: tuple[str, ...], make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """What pickle and deepcopy call: makes the module as its own class would, and gives it the subclass."""
    module = make(*args)
    module.__class__ = sl_class(base, names)
    return module


def sl_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the factorized weights that this module owns itself; empty for an ordinary module."""
    names = (name.removesuffix(SUFFIX) for name, child in module._modules.items() if isinstance(child, SLWeight))
    return tuple(sorted(names))


def dense_names(model: nn.Module) -> list[str]:
    """Names of a model's parameters as they are when all its weights are dense: what patterns are matched with."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, SLWeight):
            names.append(path.removesuffix(SUFFIX))
        else:
            names += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    return [plain_name(name) for name in names]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before conversion."""
    return getattr(type(module), "sl_base", type(module))


def template(weight: Tensor, config: SLConfig, input_dim: int) -> SLWeight:
    """A weight module on the meta device: the shapes of the factors of ``weight``, for a graph that is to be built."""
    return SLWeight(weight.shape, replace(config, seed=0), input_dim=input_dim, device="meta", dtype=weight.dtype)


def class_with(module: nn.Module, names: tuple[str, ...]) -> type[nn.Module]:
    """The class that a module needs where these of its weights are factorized.

    Raises:
        TypeError: As ``sl_class``.
    """
    if not names or isinstance(module, fx.GraphModule):  # a graph reads the factors itself, and nobody else reads it
        return base_class(module)
    base: Any = base_class(module)  # mypy takes an unbound Module.__hash__ for the class's own
    return sl_class(base, names)


def snapshot(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, type, dict, dict, dict]]:
    """What ``put_in_place`` and ``take_out`` change of these modules, for ``restore``."""
    orders = [(each, dict(vars(each).get(_ORDER, {}))) for each in modules]
    return [(each, type(each), dict(each._parameters), dict(each._modules), order) for each, order in orders]


def restore(before: Iterable[tuple[nn.Module, type, dict, dict, dict]]) -> None:
    """Puts modules back as they were at their ``snapshot``, at whatever point the change was interrupted."""
    for module, kind, parameters, children, order in before:
        module.__class__ = kind
        for current, old in ((module._parameters, parameters), (module._modules, children)):
            current.clear()
            current.update(old)
        vars(module).pop(_ORDER, None)
        if order:
            vars(module)[_ORDER] = order


def put_in_place(module: nn.Module, name: str, weight: SLWeight) -> None:
    """Replaces the dense parameter ``name`` by ``weight``: afterwards ``module.<name>`` is the composed tensor."""
    cls = class_with(module, tuple(sorted({*sl_names(module), name})))
    order = list(module._parameters)
    module.add_module(name + SUFFIX, weight)  # raises where the name is taken
    module.__class__ = cls
    vars(module).setdefault(_ORDER, {})[name] = order
    del module._parameters[name]


def take_out(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """The inverse of ``put_in_place``; leaves nothing of it behind, the order of the parameters included."""
    delattr(module, name + SUFFIX)
    module.__class__ = class_with(module, sl_names(module))
    module._parameters[name] = parameter
    orders = vars(module)[_ORDER]
    order = orders.pop(name)
    for each in [each for each in order if each in module._parameters]:
        module._parameters[each] = module._parameters.pop(each)
    if not orders:
        del vars(module)[_ORDER]
