"""PartsWeight: what the structures share whose two factors follow from smaller parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from slcompile.config import SLConfig
from slcompile.cost import Matmul
from slcompile.ops import FactoredOps
from slcompile.weight.structure import SHARES_WITH, FactorizedWeight


class PartsWeight(FactorizedWeight):
    """A weight ``W = scale * B @ A``, or ``base + scale * B @ A``, whose factors follow from its parts.

    Of it, ``FactoredOps`` has the formulas. A subclass has ``ops`` and ``main`` and implements ``part_shapes``,
    ``draw_others`` and ``approximate``. For the arguments see ``FactorizedWeight``.

    Attributes:
        ops: What composes it, and how it is multiplied with.
        main: Names of the parts to which B and A go in proportion: one of them starts at zero, beside a base. All
            others start so that they leave the variance of B and A as it is.
    """

    ops: ClassVar[FactoredOps]
    main: ClassVar[tuple[str, str]]
    takes_base = True

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
        if misfit := self.misfit_of(self.shape, config):
            raise ValueError(f"a weight of shape {self.shape} {misfit}")
        self.blocks = self.blocks_for(self.shape, config)
        self.rank = self.rank_of(self.shape, config)
        self._scale_ratio = config.scale_for(self.rank, self.inputs).as_integer_ratio()
        new = functools.partial(torch.empty, device=device, dtype=dtype)
        for part, size in self.part_shapes(self.shape, config).items():
            self.register_parameter(part, nn.Parameter(new(size)))
        self.register_base(config, device, dtype)

    @classmethod
    @override
    def misfit_of(cls, shape: Sequence[int], config: SLConfig) -> str:
        rank, side = cls.rank_of(shape, config), min(shape)
        return f"has {side} as its smaller side, which rank={rank} is above" if rank > side else ""

    @classmethod
    def blocks_for(cls, shape: Sequence[int], config: SLConfig) -> int:
        """Returns into how many a weight of this shape is cut."""
        return 1

    @classmethod
    def rank_of(cls, shape: Sequence[int], config: SLConfig) -> int:
        """Returns the rank of B and A; of blocks, that of one block."""
        return config.rank_for(*shape)

    @classmethod
    def part_shapes(cls, shape: Sequence[int], config: SLConfig) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of each part, in the order of the op."""
        raise NotImplementedError

    def draw_others(self) -> None:
        """Draws the parts that are not ``main``."""

    @classmethod
    @override
    def size(cls, shape: Sequence[int], config: SLConfig) -> int:
        return sum(map(math.prod, cls.part_shapes(shape, config).values()))

    @property
    def inputs(self) -> int:
        """Numbers that one entry of a product with it is a sum of."""
        return self.shape[self.input_dim]

    @override
    def operands(self) -> dict[str, Tensor]:
        base = {"base": self.base} if self.base is not None else {}
        return {**{name: getattr(self, name) for name in self.ops.parts}, **base}

    @override
    def op_args(self) -> tuple[Any, ...]:
        return (self.scale,)

    @override
    def matrix_by_formula(self) -> Tensor:
        return self._composed(self.ops.composed)

    @torch.no_grad()
    @override
    def reset_parameters(self) -> None:
        """Draws a random start.

        The factor at the input's side is Kaiming-uniform(a=sqrt(5)), as ``nn.Linear`` is. With a base, the other is
        zero, so that the weight is the base; without one, it is uniform, so that the entries of the weight have the
        variance of ``nn.Linear``'s.
        """
        self.draw_others()
        reading = 1 / math.sqrt(self.inputs)
        writing = 0.0 if self.has_base else math.sqrt(3 / self.rank) / self.scale
        bounds = (writing, reading) if self.input_dim == 1 else (reading, writing)
        for name, bound in zip(self.main, bounds, strict=True):
            getattr(self, name).uniform_(-bound, bound)

    @torch.no_grad()
    @override
    def start_at_zero(self) -> None:
        self.reset_parameters()
        self.get_parameter(self.main[1 - self.input_dim]).zero_()

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "alpha": self.scale * self.rank,
            **({"blocks": self.blocks} if self.takes_blocks else {}),
            **({"base": self.base_kind} if self.has_base else {}),
            "input_dim": self.input_dim,
        }

    @property
    @override
    def compose_flops(self) -> int:
        return self._matmul.compose_flops

    @override
    def factored_flops(self, tokens: int) -> int:
        return self._matmul.factored_flops(tokens)

    @property
    def _matmul(self) -> Matmul:
        rows, columns = self.shape
        return Matmul(rows, columns, self.rank, 0, self.dtype, base=self.has_base)

    @override
    def check_support(self) -> None:
        """Raises RuntimeError where factors that were shared are no more, of which a checkpoint would keep one."""
        first = vars(self).get(SHARES_WITH)
        if first is not None and any(getattr(self, part) is not getattr(first, part) for part in self.sharable):
            raise RuntimeError(
                f"{' and '.join(self.sharable)} were shared with another weight and are no more: something gave one of "
                "them another object (to_empty, load_state_dict with assign=True). Where they are equal, call "
                "slcompile.share_factors again"
            )

    @torch.no_grad()
    def set_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Copies given tensors into the parameters of these names; where one is smaller, the rest becomes zero."""
        for name, value in parts.items():
            parameter = self.get_parameter(name)
            parameter.zero_()
            parameter[tuple(map(slice, value.shape))] = value.to(parameter.dtype)
