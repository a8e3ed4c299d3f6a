"""SLWeight: sparse plus low rank (SLTrain, arXiv 2406.02214), the structure that the package is named after."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from slcompile.config import SLConfig
from slcompile.cost import Matmul
from slcompile.ops import compose_reference
from slcompile.ops.quantized import as_base
from slcompile.ops.support import (
    IMPORTED,
    SEED_LIMIT,
    draw_seed,
    flat_positions,
    group_widths,
    groups_per_row,
    offset_dtype,
    offset_index,
    uniform_count,
    uniform_dtype,
    uniform_index,
)
from slcompile.weight.fit import fit
from slcompile.weight.marks import mark_values
from slcompile.weight.start import spectral_factors
from slcompile.weight.structure import FactorizedWeight, register


@dataclass(frozen=True, eq=False)
class Factors:
    """The parts of one factorized weight, ``scale * B @ A + S``, detached.

    Attributes:
        B: [rows, rank], or a stack [experts, rows, rank].
        A: [rank, columns], or a stack.
        values: [rows, groups] of the stratified and the vector support, [non-zeros] of the uniform and the largest one.
        seed: Of the support.
        index: Flat positions of the uniform and the largest support, ascending; None for the others.
        scale: Of the low-rank part.
        vector: Rows that share their columns: 1 but for the vector support.
        base: What they are added to, of the weight's shape, unpacked; None for nothing.
    """

    B: Tensor
    A: Tensor
    values: Tensor
    seed: int
    index: Tensor | None
    scale: float
    vector: int = 1
    base: Tensor | None = None


@register
class SLWeight(FactorizedWeight):
    """A weight ``W = scale * B @ A + S`` of shape [rows, columns] whose forward is one op, ``compose``.

    Parameters ``B`` [rows, rank], ``A`` [rank, columns], ``values`` ([rows, groups] stratified and vector, [non-zeros]
    uniform and largest); buffers ``seed`` (one int64), of the uniform support ``index`` (int32, sorted), of the vector
    support ``rows_of_block`` (one int64), so that a state dict says it; of the largest support ``offsets`` in groups
    (uint8, [non-zeros]), from which ``index`` follows there, which no state dict holds. A stack of matrices [experts,
    rows, columns] has stacks of factors; its support is that of one matrix of ``experts * rows`` rows.

    With a frozen base there is one more parameter, ``base`` of the weight's shape or packed as uint8, without gradient,
    and ``W = base + scale * B @ A + S``. The density may then be 0: ``values`` and ``seed`` are empty buffers, which no
    state dict holds.

    ``config`` gives rank, density, alpha, support and base; ``config.seed`` and ``name`` give the seed. The factor at
    the side of ``input_dim`` is the one that starts random. For the other arguments see ``FactorizedWeight``.
    """

    structure = "sparse_low_rank"
    op = torch.ops.slcompile.compose.default
    takes_stacks = True
    takes_density = True
    takes_base = True

    B: nn.Parameter
    A: nn.Parameter
    values: Tensor  # a parameter, but where there is no sparse part
    seed: Tensor
    index: Tensor  # of the uniform and the largest support only
    offsets: Tensor  # of the largest support only
    rows_of_block: Tensor  # of the vector support only
    vector: int

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
        super().__init__(shape, config, input_dim=input_dim)
        self.density = config.plain_density
        self.support = config.support if self.density else "stratified"  # of which no non-zero takes no memory
        self.vector = config.vector if self.support == "vector" else 1
        *stack, rows, columns = self.shape
        self.rank = config.rank_for(rows, columns)
        self._scale_ratio = config.scale_for(self.rank, self.shape[-2:][input_dim]).as_integer_ratio()
        self.drawn_seed = draw_seed(config.seed, name) if self.density else 0
        new = functools.partial(torch.empty, device=device, dtype=dtype)
        self.B = nn.Parameter(new(*stack, rows, self.rank))
        self.A = nn.Parameter(new(*stack, self.rank, columns))
        values = new(values_shape(self.shape, config))
        if self.density:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values, persistent=False)
        self.register_base(config, device, dtype)
        self.register_buffer("seed", torch.empty(1, dtype=torch.int64, device=device), persistent=bool(self.density))
        if self.has_index:
            index = torch.empty(self.values.shape, dtype=uniform_dtype(*self.as_matrix), device=device)
            self.register_buffer("index", index, persistent=self.support == "uniform")
        if self.support == "largest":
            kind = offset_dtype(self.shape[-1], self.groups)
            self.register_buffer("offsets", torch.zeros(self.values.shape, dtype=kind, device=device))
        if self.vector > 1:
            self.register_buffer("rows_of_block", torch.empty(1, dtype=torch.int64, device=device))
        self._restore_support()

    @classmethod
    @override
    def size(cls, shape: Sequence[int], config: SLConfig) -> int:
        *stack, rows, columns = shape
        low_rank = math.prod(stack) * config.rank_for(rows, columns) * (rows + columns)
        return low_rank + math.prod(values_shape(shape, config))

    @property
    def as_matrix(self) -> tuple[int, int]:
        """Rows, those of a stack one after another, and columns."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def has_index(self) -> bool:
        """Whether the positions of the non-zeros are held, and not computed from the seed."""
        return self.support in ("uniform", "largest")

    @property
    def groups(self) -> int:
        """Groups of a row, each of which holds one non-zero; not of the uniform support."""
        return groups_per_row(self.shape[-1], self.density)

    @property
    @override
    def nonzeros(self) -> int:
        return self.values.numel()

    @property
    @override
    def compose_flops(self) -> int:
        return self._matmul.compose_flops

    @override
    def factored_flops(self, tokens: int) -> int:
        return self._matmul.factored_flops(tokens)

    @property
    def _matmul(self) -> Matmul:
        return Matmul(*self.as_matrix, self.rank, self.nonzeros, self.dtype, self.vector, self.has_base)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.density:
            mark_values(self.values)  # copies of a parameter do not carry its marks

    @override
    def operands(self) -> dict[str, Tensor]:
        where = "index" if self.has_index else "seed"
        return {name: getattr(self, name) for name in ("B", "A", "values", where, *self._base_name)}

    @override
    def op_args(self) -> tuple[Any, ...]:
        return (self.scale, None, self.vector) if self.vector > 1 or self.has_base else (self.scale,)

    @property
    def _base_name(self) -> tuple[str, ...]:
        return ("base",) if self.has_base else ()

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        indices = [self.index] if self.has_index else []
        indices += [self.offsets] if self.support == "largest" else []
        names = ("seed", *(["rows_of_block"] if self.vector > 1 else ()), *self._base_name)
        buffers = [getattr(self, name) for name in names]
        return {"factors": [self.B, self.A], "values": [self.values], "indices": indices, "buffers": buffers}

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "alpha": self.scale * self.rank,
            "density": self.density,
            **({"support": self.support} if self.density else {}),
            **({"vector": self.vector} if self.support == "vector" else {}),
            **({"base": self.base_kind} if self.has_base else {}),
            "input_dim": self.input_dim,
        }

    @override
    def matrix_by_formula(self) -> Tensor:
        def by_formula(*arguments: Any) -> Tensor:
            B, A, values, support, scale, *_ = arguments
            return compose_reference(B, A, values, support, scale, self.vector, self.base)

        return self._composed(by_formula)

    @override
    def _composed(self, op: Callable[..., Tensor]) -> Tensor:
        # Read in the order of ``operands``, so that Dynamo's graph equals the one that was compiled for the conversion.
        operands = [self.B, self.A, self.values, self.index if self.has_index else self.seed]
        if operands[2].dtype != operands[0].dtype:  # FSDP2's mixed precision casts no values that are no parameter
            operands[2] = operands[2].to(operands[0].dtype)
        if self.base is not None:
            operands.append(self.base)
        return op(*self.arguments(operands))

    @torch.no_grad()
    @override
    def reset_parameters(self) -> None:
        """Draws the paper's start and restores the support's buffers.

        The factor that reads the input is Kaiming-uniform(a=sqrt(5)), the other zero, values U(+-1/sqrt(in)); with a
        base, values are zero, so that the weight is the base. The largest support stays where it is.
        """
        fan_in = self.shape[-2:][self.input_dim]
        bound = 1 / math.sqrt(fan_in)
        reading, other = (self.A, self.B) if self.input_dim == 1 else (self.B, self.A)
        reading.uniform_(-bound, bound)
        other.zero_()
        if self.has_base:
            self.values.zero_()
        else:
            self.values.uniform_(-bound, bound)
        self._restore_support()

    @torch.no_grad()
    @override
    def start_at_zero(self) -> None:
        self.reset_parameters()  # of which one factor is zero
        self.values.zero_()

    @override
    def approximate(self, dense: Tensor) -> None:
        """Sets the factors to the truncated SVD of ``dense``, and the values to the residual at the support.

        For the largest support, it alternates between the two, as ``fit`` does.
        """
        if self.support == "largest":
            self.fit(dense)
            return
        support = self.index if self.has_index else self.seed
        self.set_factors(*spectral_factors(dense, self.rank, self.scale, self.values, support, self.vector))

    @torch.no_grad()
    def fit(self, dense: Tensor, inputs: Tensor | None = None, gradients: Tensor | None = None) -> None:
        """Sets the factors, the values and the largest support so that least is lost of what ``dense`` computes.

        Args:
            dense: The weight to be near, of ``shape``.
            inputs, gradients: Second moments, as ``slcompile.weight.fit`` takes them.
        """
        where: int | Tensor = self.groups
        if self.support != "largest":
            support = self.index if self.has_index else self.seed
            where = flat_positions(self.values, support, self.shape[-1], self.vector)
        B, A, positions, values = fit(dense, self.rank, where, inputs, gradients, self.input_dim)
        if self.support == "largest":
            starts, _ = group_widths(self.shape[-1], self.groups, positions.device)
            self.offsets.copy_((positions % self.shape[-1]).view(-1, self.groups).sub(starts).flatten())
            self._restore_support()
        self.set_factors(B, A / self.scale, values.view(self.values.shape))

    @torch.no_grad()
    def move(self, which: Tensor, offsets: Tensor) -> None:
        """Moves non-zeros of the largest support to other places in their groups, with values of zero.

        Args:
            which: Positions among ``values``, int64, without repetition.
            offsets: Of each in its group.
        """
        assert self.support == "largest", self.support
        self.offsets.copy_(self.offsets.to(torch.int64).index_copy_(0, which, offsets))
        self._follow_offsets()
        self.values.index_fill_(0, which, 0.0)

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor, values: Tensor) -> None:
        """Copies given factors into the parameters, which have their shapes."""
        for parameter, value in ((self.B, B), (self.A, A), (self.values, values)):
            parameter.copy_(value)

    @override
    def factors(self) -> Factors:
        """Returns the parameters, detached, sharing memory. Raises as ``check_support``."""
        self.check_support()
        index = self.index if self.has_index else None
        B, A, values = self.B.detach(), self.A.detach(), self.values.detach()
        base = None if self.base is None else as_base(self.base.detach(), self.shape[-1], self.dtype)
        return Factors(B, A, values, self.drawn_seed, index, self.scale, self.vector, base)

    @override
    def check_support(self) -> None:
        """Raises RuntimeError where the seed buffer is not the seed that this weight was made or loaded with.

        ``to_empty`` leaves garbage in it and averaging buffers in low precision changes it; either would silently
        move every non-zero.
        """
        if self.seed.device.type == "meta" or not self.density:
            return
        if int(self.seed) != self.drawn_seed:
            raise RuntimeError(
                f"the seed buffer holds {int(self.seed)} but this weight was drawn with {self.drawn_seed}: something "
                "overwrote it (to_empty without reset_parameters, or arithmetic over buffers). Load a state dict, or "
                "call reset_parameters()."
            )
        if self.vector > 1 and int(self.rows_of_block) != self.vector:
            raise RuntimeError(
                f"the buffer rows_of_block holds {int(self.rows_of_block)} but this weight has vector={self.vector}: "
                "something overwrote it. Load a state dict, or call reset_parameters()."
            )
        if self.support == "largest" and not torch.equal(self.index, self._index_of_offsets()):
            raise RuntimeError(
                "the buffer offsets no longer says where the non-zeros are: something overwrote it. Load a state "
                "dict, or call reset_parameters()."
            )

    def _index_of_offsets(self) -> Tensor:
        return offset_index(self.offsets, *self.as_matrix, self.groups)

    def _follow_offsets(self) -> None:
        index = self._index_of_offsets()
        if self.index.device == index.device:
            self.index.copy_(index)  # in place: whoever compiled the model holds this tensor
        else:
            self.index = index

    def _restore_support(self) -> None:
        if self.density:
            mark_values(self.values)  # to_empty brings another parameter
        self.seed.fill_(self.drawn_seed)
        if self.vector > 1:
            self.rows_of_block.fill_(self.vector)
        if self.support == "uniform" and not self.index.is_meta and self.drawn_seed != IMPORTED:
            self.index.copy_(uniform_index(self.drawn_seed, *self.as_matrix, self.density))
        if self.support == "largest":
            # to_empty leaves garbage, which must not point out of the weight.
            _, widths = group_widths(self.shape[-1], self.groups, self.offsets.device)
            offsets = self.offsets.view(-1, self.groups).to(torch.int64)
            self.offsets.copy_(offsets.clamp(min=0).minimum(widths - 1).flatten())
            self._follow_offsets()

    @override
    def misfit(self, state: Mapping[str, Any], prefix: str) -> str:
        held, values = state.get(f"{prefix}rows_of_block"), state.get(f"{prefix}values")
        has_blocks = values is not None and values.dim() > 1 and not (held is not None and held.is_meta)
        vector = 1 if held is None else int(held)
        if has_blocks and self.support != "uniform" and vector != self.vector:
            return (
                f"{prefix}values are of blocks of vector={vector} rows, those of this weight of vector={self.vector}: "
                f"its non-zeros would move. Factorize with support='vector', vector={vector}"
            )
        offsets = state.get(f"{prefix}offsets")
        if values is not None and (offsets is not None) != (self.support == "largest"):
            having = "no offsets" if offsets is None else "offsets, which are of support='largest'"
            return f"{prefix}values have {having}; this weight has support={self.support!r}: its non-zeros would move"
        own = self.offsets.shape if self.support == "largest" else None
        if offsets is not None and not offsets.is_meta and offsets.shape == own:
            _, widths = group_widths(self.shape[-1], self.groups, offsets.device)
            each = offsets.to(torch.int64).reshape(-1, self.groups)
            if not bool(((each >= 0) & (each < widths)).all()):
                return f"{prefix}offsets must lie in their groups of {int(widths.max())} columns"
        together = ("values", "seed", *({"uniform": ["index"], "largest": ["offsets"]}.get(self.support, [])))
        missing = [name for name in together if f"{prefix}{name}" not in state] if self.density else []
        if missing and len(missing) < len(together):
            held = next(name for name in together if name not in missing)
            return f"{prefix}{held} comes without {prefix}{missing[0]}: its non-zeros would move"
        seed = state.get(f"{prefix}seed")
        if (
            seed is not None
            and not seed.is_meta
            and not self.has_index
            and not bool(((seed >= 0) & (seed < SEED_LIMIT)).all())
        ):
            return f"{prefix}seed must lie in [0, {SEED_LIMIT}), got {seed.tolist()}"
        index, size = state.get(f"{prefix}index"), math.prod(self.shape)
        if index is not None and not index.is_meta:
            ends = [] if not index.numel() else [int(index[0]), int(index[-1])]
            if not bool((index[1:] > index[:-1]).all()) or (ends and not 0 <= ends[0] <= ends[1] < size):
                return f"{prefix}index must ascend in [0, {size})"
        return ""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if error := self.misfit(state_dict, prefix):
            args[-1].append(error)  # which load_state_dict raises, all of them together
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.loaded()

    @override
    def loaded(self) -> None:
        if not self.density:
            return
        mark_values(self.values)  # load_state_dict(assign=True) brings another parameter
        if self.support == "largest":
            self._follow_offsets()
        if not self.seed.is_meta:
            self.drawn_seed = int(self.seed)


def values_shape(shape: Sequence[int], config: SLConfig) -> tuple[int, ...]:
    """Returns the shape of ``values``: [..., rows, groups] where columns are drawn for each row, else [non-zeros]."""
    density = config.plain_density
    if not density:
        return (*shape[:-1], 0)
    rows, groups = math.prod(shape[:-1]), groups_per_row(shape[-1], density)
    if config.support == "largest":
        return (rows * groups,)
    return (uniform_count(rows, shape[-1], density),) if config.support == "uniform" else (*shape[:-1], groups)
