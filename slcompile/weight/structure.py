"""What every weight structure shares: the base class of factorized weights, and the table of structures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from slcompile import torch_private
from slcompile.config import STRUCTURES, SLConfig
from slcompile.names import SUFFIX, plain_name
from slcompile.ops import register_weight_op
from slcompile.ops.quantized import BITS, packed_shape, quantize

SHARES_WITH = "_slcompile_shares_with"
"""Attribute of a weight that shares factors: the weight whose they are."""

SCALE = "scale"
"""Key in the metadata of a state dict, which torch.save keeps, of a weight's scale: no tensor tells it."""

Structure = TypeVar("Structure", bound="type[FactorizedWeight]")


def matrix_shape(shape: Sequence[int], convolved: bool) -> tuple[int, ...]:
    """Returns the shape of the matrix that a weight is: [out, in * kernel] of a convolution's [out, in, *kernel]."""
    return (shape[0], math.prod(shape[1:])) if convolved else tuple(shape)


class FactorizedWeight(nn.Module):
    """One weight made of trained parts, in the place of a dense one.

    A structure is a subclass under ``@register``, whose forward is one op. The rest of the package knows weights by
    what this class says of them, and never by the subclass. A subclass has the constructor below, registers its parts
    as parameters and buffers, and implements ``size``, ``operands``, ``op_args``, ``reset_parameters``,
    ``approximate``, ``describe`` and ``compose_flops``.

    Args:
        shape: Of the weight: [rows, columns], or a stack of matrices [experts, rows, columns]. A convolution's
            [out, in, *kernel] is the matrix [out, in * kernel] here; ``stored_as`` says how its owner stores it.
        config: The options.
        name: Fully qualified name of the weight, from which a seed may be derived.
        input_dim: Dimension of the matrix that the matmul contracts: 1 for ``nn.Linear`` [out, in], 0 for a
            Conv1D-style [in, out].
        device, dtype: Of the parameters.

    The parameters are uninitialised until ``reset_parameters`` or ``approximate``.

    Attributes:
        structure: Name in the table of structures, and in checkpoints.
        op: The op that composes the weight, ``op(*operands, *op_args) -> Tensor``, in ``slcompile.ops.WEIGHT_OPS``.
        takes_stacks: Whether it takes the place of stacks of matrices, too; those stay dense otherwise.
        takes_density: Whether it has a sparse part, to which the options density, support and vector apply.
        takes_blocks: Whether it cuts a weight, as the option blocks says.
        takes_base: Whether it can be added to a weight that stays: its parameter ``base``, of ``shape`` or packed,
            where ``config.base`` asks for one (``register_base``). It is the last operand then, which the op takes
            after its other arguments.
        sharable: Names of the parts that weights of equal shape may share (``slcompile.share_factors``).
    """

    structure: ClassVar[str]
    op: ClassVar[torch._ops.OpOverload]
    takes_stacks: ClassVar[bool] = False
    takes_density: ClassVar[bool] = False
    takes_blocks: ClassVar[bool] = False
    takes_base: ClassVar[bool] = False

    sharable: ClassVar[tuple[str, ...]] = ()

    base: nn.Parameter | None
    _scale_ratio: tuple[int, int] = (1, 1)
    _stored_shape: tuple[int, ...] | None = None  # where it is another one than ``shape``

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

    # What a structure says of itself.

    @classmethod
    def size(cls, shape: Sequence[int], config: SLConfig) -> int:
        """Returns the number of trained parameters of a weight of this shape."""
        raise NotImplementedError

    @classmethod
    def misfit_of(cls, shape: Sequence[int], config: SLConfig) -> str:
        """Says why no weight of this shape can be of this structure; empty if one can."""
        return ""

    def operands(self) -> dict[str, Tensor]:
        """Returns the tensors that ``op`` takes, in its order, by the names they have in this module."""
        raise NotImplementedError

    def op_args(self) -> tuple[Any, ...]:
        """Returns what ``op`` takes after its operands, and before a base."""
        return ()

    def arguments(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Returns what ``op`` is called with, from what stands for the operands: tensors, or nodes of a graph."""
        count = len(operands) - self.has_base
        return (*operands[:count], *self.op_args(), *operands[count:])

    def reset_parameters(self) -> None:
        """Draws a random start, and restores buffers that are computed; a base stays as it is."""
        raise NotImplementedError

    def start_at_zero(self) -> None:
        """Draws a start whose composed matrix is zero and can be trained; the default, a random one, is not zero."""
        self.reset_parameters()

    def approximate(self, dense: Tensor) -> None:
        """Sets the parameters so that the composed matrix is near ``dense``, of ``shape``."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Returns what ``from_description`` needs beside the shape, as JSON holds it."""
        raise NotImplementedError

    @classmethod
    def from_description(
        cls, shape: Sequence[int], described: Mapping[str, Any], *, name: str, dtype: torch.dtype
    ) -> Self:
        """Makes the empty weight that ``describe`` described; the state dict fills it.

        The default takes what is described for fields of ``SLConfig``, but for ``input_dim``.

        Raises:
            ValueError: A value is not allowed.
        """
        options = {key: value for key, value in described.items() if key != "input_dim"}
        config = SLConfig(structure=cls.structure, **options)
        return cls(shape, config, name=name, input_dim=described["input_dim"], dtype=dtype)

    @property
    def compose_flops(self) -> int:
        """Floating-point operations of composing the weight once; its gradients take twice as many."""
        raise NotImplementedError

    def factored_flops(self, tokens: int) -> int:
        """Returns the floating-point operations of multiplying with the parts; 0 where no lowering does so."""
        return 0

    @property
    def scale(self) -> float:
        """Factor of the low-rank part, which the constructor sets as a ratio of integers; 1 where it sets none.

        With dynamic shapes, Dynamo makes floats symbolic.
        """
        numerator, denominator = self._scale_ratio
        return numerator / denominator

    def register_base(self, config: SLConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Makes the parameter ``base``, not filled, where the options ask for one; called by the constructor."""
        self.register_parameter("base", None)
        if config.base in BITS:
            packed = torch.empty(packed_shape(self.shape, config.base), dtype=torch.uint8, device=device)
            self.base = nn.Parameter(packed, requires_grad=False)
        elif config.base is not None:
            self.base = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype), requires_grad=False)

    @property
    def base_kind(self) -> str | None:
        """How the base is held, as ``config.base`` says it."""
        base = self._parameters.get("base")
        if base is None:
            return None
        packed = (kind for kind in BITS if base.shape == packed_shape(self.shape, kind))
        return "frozen" if base.is_floating_point() else next(packed)

    @property
    def has_base(self) -> bool:
        """Whether the parts are added to a weight that stays, the parameter ``base``."""
        return getattr(self, "base", None) is not None  # of replicas, no tensor is a parameter

    def numel(self) -> int:
        """Counts the numbers that its parameters hold; a packed base has as many as the weight, not as its bytes."""
        return sum(math.prod(self.shape) if name == "base" else each.numel() for name, each in self.named_parameters())

    @property
    def nonzeros(self) -> int:
        """Entries of the sparse part; 0 where there is none."""
        return 0

    def parts(self) -> dict[str, list[Tensor]]:
        """Returns the tensors that are held, by kind.

        Returns:
            ``"factors"`` and ``"values"``: the trained parameters, those of a sparse part apart. ``"indices"``: stored
            positions. ``"buffers"``: all else.
        """
        factors: list[Tensor] = []
        rest: list[Tensor] = list(self.buffers())
        for name, parameter in self.named_parameters():
            (rest if name == "base" else factors).append(parameter)
        return {"factors": factors, "values": [], "indices": [], "buffers": rest}

    def check_support(self) -> None:
        """Raises RuntimeError where a buffer that says where the parts go was overwritten."""

    def loaded(self) -> None:
        """Takes note that parameters and buffers were loaded or replaced from outside, and not by a state dict."""

    def misfit(self, state: Mapping[str, Any], prefix: str) -> str:
        """Says why entries of a state dict cannot be this weight's parts, whose shapes they have; empty if they can.

        Args:
            state: The state dict.
            prefix: What the names of this weight's entries begin with.
        """
        return ""

    # What follows from it.

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        config: SLConfig,
        how: str,
        *,
        name: str = "",
        input_dim: int = 1,
        convolved: bool = False,
    ) -> Self:
        """Makes the weight that takes a dense one's place.

        Args:
            dense: [rows, columns], a stack of such, or a convolution's [out, in, *kernel]; on the meta device nothing
                is initialised. With a frozen base, it is that, and shares its memory where it lies there row by row; a
                packed one is made of it.
            config: The options.
            how: ``"kaiming"``: a random start, whatever ``dense`` holds; ``"spectral"``: its approximation. A weight
                that is zero stays so, unless the options ask for the random start.
            name, input_dim: As for the class.
            convolved: Whether it is a convolution's.
        """
        stored, dense = dense.shape, dense.reshape(matrix_shape(dense.shape, convolved))
        weight = cls(dense.shape, config, name=name, input_dim=input_dim, device=dense.device, dtype=dense.dtype)
        weight.stored_as(stored)
        if config.base == "frozen":
            weight.base = nn.Parameter(dense.contiguous(), requires_grad=False)
        if dense.is_meta:
            return weight
        if config.base in BITS:
            weight.base = nn.Parameter(quantize(dense.detach(), config.base), requires_grad=False)
        with torch.autocast(dense.device.type, enabled=False):  # a training step may be what converts
            if config.init != "kaiming" and not bool(dense.any()):
                weight.start_at_zero()  # its approximation would have no gradient, and a random start another output
            elif how == "spectral":
                weight.approximate(dense)
            else:
                weight.reset_parameters()
        return weight

    def stored_as(self, shape: Sequence[int]) -> Self:
        """Takes note of the shape in which its owner stores the weight, row by row; returns itself."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        self._stored_shape = None if tuple(shape) == self.shape else tuple(shape)
        return self

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which its owner stores the weight: ``shape``, or a convolution's [out, in, *kernel]."""
        return self._stored_shape or self.shape

    @property
    def convolved(self) -> bool:
        """Whether it is a convolution's, so that ``stored_shape`` is another one than ``shape``."""
        return self._stored_shape is not None

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Shows a matrix of ``shape`` as the weight's owner reads it."""
        return matrix.view(self.stored_shape) if self.convolved else matrix

    def matrix(self) -> Tensor:
        """Composes the weight, of ``shape``."""
        # torch.func has no gradient for an opaque op, and forward-mode AD silently drops its tangent. Exporters
        # translate none, and a program that was exported may run where slcompile is not installed.
        if torch_private.is_exporting():
            return self.matrix_by_formula()
        if not torch_private.is_transforming():
            return self._composed(type(self).op)
        kind = next(iter(self.operands().values())).device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # not on meta
            return self.matrix_by_formula()
        with torch.autocast(kind, enabled=False):  # which the op is not subject to, either
            return self.matrix_by_formula()

    def matrix_by_formula(self) -> Tensor:
        """Composes it by its formula, in ops that every transform can differentiate; by default the op itself.

        What ``op`` computes is checked against it.
        """
        return self._composed(type(self).op)

    def _composed(self, op: Callable[..., Tensor]) -> Tensor:
        return op(*self.arguments(list(self.operands().values())))

    def forward(self) -> Tensor:
        """Composes the weight, of ``stored_shape``."""
        return self.as_stored(self.matrix())

    def reference(self) -> Tensor:
        """Composes the weight by its formula, of ``stored_shape``."""
        return self.as_stored(self.matrix_by_formula())

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, and the composed weight's."""
        return next(self.parameters()).dtype

    def factors(self) -> Any:
        """Returns the op's operands by name, detached, sharing memory."""
        self.check_support()
        return {name: operand.detach() for name, operand in self.operands().items()}

    @torch.no_grad()
    def merged_wide(self) -> Tensor:
        """Composes the dense weight, of ``stored_shape``, in at least float32 and leaves it so.

        Raises:
            RuntimeError: A seed buffer was overwritten, or the parts are sharded.
        """
        self.check_support()
        self.check_whole()
        wide = torch.promote_types(self.dtype, torch.float32)
        operands = (each.detach() for each in self.operands().values())
        operands = (each.to(wide) if each.is_floating_point() else each for each in operands)
        return self.as_stored(type(self).op(*self.arguments(list(operands))))

    def merged(self) -> Tensor:
        """Composes the dense weight and rounds it once, to the parameters' dtype. Raises as ``merged_wide``."""
        return self.merged_wide().to(self.dtype)

    def check_whole(self) -> None:
        """Raises RuntimeError where FSDP holds the parts in shards, of which no process can compose the weight."""
        if any(type(parameter.data) is not Tensor for parameter in self.parameters()):
            raise RuntimeError(
                "the factors are sharded among processes: get a full state dict (get_model_state_dict with "
                "StateDictOptions(full_state_dict=True, cpu_offload=True)), load it into the factorized model of one "
                "process, and merge that"
            )

    @override
    def extra_repr(self) -> str:
        described = (f"{key}={value}" for key, value in self.describe().items() if key != "input_dim")
        return ", ".join(["x".join(map(str, self.stored_shape)), *described])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_support()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][SCALE] = self.scale


def register(cls: Structure) -> Structure:
    """Puts a structure into the table, under its name, and its op among those that the passes know."""
    assert issubclass(cls, FactorizedWeight), cls
    STRUCTURES[cls.structure] = cls
    register_weight_op(cls.op)
    return cls


def weights_in(model: nn.Module) -> list[FactorizedWeight]:
    """Returns the factorized weights of a model, each once."""
    return [module for module in model.modules() if isinstance(module, FactorizedWeight)]


def weights_by_name(model: nn.Module) -> dict[str, FactorizedWeight]:
    """Returns the factorized weights of a model by dense name, each once, by the first of its names."""
    named = ((path, module) for path, module in model.named_modules() if isinstance(module, FactorizedWeight))
    return {plain_name(path.removesuffix(SUFFIX)): module for path, module in named}


def structure_of(config: SLConfig) -> type[FactorizedWeight]:
    """Returns the class of the structure that the options name."""
    return STRUCTURES[config.structure]


def template(dense: Tensor, config: SLConfig, input_dim: int, convolved: bool = False) -> FactorizedWeight:
    """Makes what takes a dense weight's place on the meta device: shapes alone, for a graph that is to be built."""
    cls, config = structure_of(config), replace(config, seed=0)
    shape = matrix_shape(dense.shape, convolved)
    weight = cls(shape, config, input_dim=input_dim, device="meta", dtype=dense.dtype)
    return weight.stored_as(dense.shape)
