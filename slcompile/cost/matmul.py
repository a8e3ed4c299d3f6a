"""What each lowering of a matmul with a factorized weight takes: FLOPs, bytes, and seconds at a device's rates.

T tokens, a weight W_NK of rank R with P non-zeros. Composed: a dense product, and W composed once a phase. Factored:
two products through the rank and one with S. Every time is the larger of operations at the device's rate and bytes at
its bandwidth (the roofline); times of one matmul's parts are added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class Rates:
    """What a device reaches, by dtype name where it differs.

    Attributes:
        matmul: FLOP/s of large dense matmuls.
        sparse: FLOP/s of ``x @ S^T`` and its gradients, where the dense operand is vectorised over the tokens.
        memory: Bytes/s of large copies.
        entries: Positions of non-zeros computed in a second, by ``compose``; infinite where kernels compute them in
            registers.
        index_bytes: Of a non-zero's position, which a sparse product reads; 0 where kernels compute it.
        transposes: How often a sparse product copies its operands into another layout.
        narrow: Share of ``matmul`` that products of a weight's size through its rank reach: their sums are short, or
            their results few.
        launch: Seconds that a kernel takes however small its work is.
        sector: Bytes of memory that reading one entry of a dense matrix moves; 0 where ``entries`` holds it.
        tiled: Share of ``matmul`` that ``x @ S`` reaches where kernels spread the non-zeros over dense tiles. The
            gradient of values is then read from the dense product. 0 where both are products with the non-zeros alone.
        vector: FLOP/s of the same as ``sparse`` where rows share their columns (the vector support): such a product
            reads neither positions nor another layout. Empty where kernels are those of other supports, at ``sparse``.
        gathers: Bytes/s at which the vector support's kernels for many tokens gather columns of x^T from the cache. 0
            where there are none.
        own: Share of ``matmul`` that the products of these kernels reach.
    """

    matmul: Mapping[str, float]
    sparse: Mapping[str, float]
    memory: float
    entries: float = float("inf")
    index_bytes: int = 0
    transposes: int = 0
    narrow: float = 1.0
    launch: float = 0.0
    sector: int = 0
    tiled: float = 0.0
    vector: Mapping[str, float] = field(default_factory=dict)
    gathers: float = 0.0
    own: float = 1.0

    def times(self, threads: int) -> Rates:
        """Returns the rates of so many threads, where these are one's."""
        by_dtype = (self.matmul, self.sparse, self.vector)
        matmul, sparse, vector = ({name: rate * threads for name, rate in each.items()} for each in by_dtype)
        memory, entries = self.memory * threads, self.entries * threads
        return dataclasses.replace(self, matmul=matmul, sparse=sparse, memory=memory, entries=entries, vector=vector)


SPLIT = 512
"""Terms of a long sum that one program of a kernel adds up; the partial sums are added by a second launch."""

FEW_TOKENS = 256
"""Most tokens that the factored matmul's first kernels are for. They read hidden matrices and write partial sums again
and again, gigabytes of them for a training batch."""

LEAST_VECTOR = 16
"""Rows that share their columns, at least, for the kernels for more tokens: a matrix unit's side."""

VECTOR_SPLIT = 2048
"""Tokens that a program of these kernels adds up, of the gradient of values."""


def vector_block(vector: int) -> int:
    """Returns the rows of a program of these kernels; of several blocks, each one's columns are multiplied for all."""
    return 64 if vector < 64 else 128


@dataclass(frozen=True)
class Matmul:
    """One matmul with a factorized weight, or the product that makes its gradient: N rows, K columns, rank R.

    ``vector`` rows share their columns: 1 but for the vector support. ``base`` is whether all is added to a dense
    matrix that stays. Of a weight of ``blocks`` on the diagonal, the rank is that of a block.
    """

    rows: int
    columns: int
    rank: int
    nonzeros: int
    dtype: torch.dtype
    vector: int = 1
    base: bool = False
    blocks: int = 1

    @property
    def _name(self) -> str:
        return DTYPES[self.dtype]

    def _product(self, m: float, n: float, k: float, rates: Rates, share: float = 1.0) -> float:
        moved = (m * k + k * n + m * n) * self.dtype.itemsize
        return max(2 * m * n * k / (share * rates.matmul[self._name]), moved / rates.memory) + rates.launch

    def _added(self, rows: int, columns: int, rates: Rates) -> float:
        """Returns seconds to read a matrix and to write it: another one is added to it."""
        return 2 * rows * columns * self.dtype.itemsize / rates.memory

    def _sparse(self, tokens: int, rates: Rates) -> float:
        if not self.nonzeros:
            return 0.0
        if self.vector > 1 and self._name in rates.vector:
            moved = (tokens * (self.rows + self.columns) + self.nonzeros) * self.dtype.itemsize
            return max(2 * tokens * self.nonzeros / rates.vector[self._name], moved / rates.memory) + rates.launch
        copied = 2 * tokens * (self.rows + self.columns) * self.dtype.itemsize * rates.transposes
        read = self.nonzeros * (self.dtype.itemsize + rates.index_bytes)
        operations = 2 * tokens * self.nonzeros / rates.sparse[self._name]
        return max(operations, read / rates.memory) + copied / rates.memory + rates.launch

    def _tiled(self, tokens: int, rates: Rates) -> float:
        """Returns seconds of x @ S in dense tiles, and of its partial sums in float32, written and read."""
        if not self.nonzeros:
            return 0.0
        operations = 2 * tokens * self.rows * self.columns / (rates.tiled * rates.matmul[self._name])
        sums = 2 * 4 * tokens * self.columns * math.ceil(self.rows / SPLIT)
        return operations + sums / rates.memory + 2 * rates.launch

    def _is_gathered(self, tokens: int, rates: Rates) -> bool:
        """Returns whether kernels gather columns for matrix units."""
        is_vector = self.nonzeros > 0 and self.vector >= LEAST_VECTOR
        return is_vector and rates.gathers > 0 and tokens > FEW_TOKENS

    def _gathered(self, tokens: int, rates: Rates, transposed: bool, shared: int) -> float:
        """Returns seconds of hidden @ factor and of the product with S, by the vector support's kernels."""
        size = self.dtype.itemsize
        rate = rates.own * rates.matmul[self._name]
        if transposed:
            # z is written and read: the tokens of each block's columns.
            moved = (tokens * self.rows + 2 * tokens * self.nonzeros // self.vector) * size
            return 2 * tokens * self.columns * self.rank / rate + moved / rates.memory + 4 * rates.launch
        copied = 2 * tokens * self.columns * size / shared
        tail = self.nonzeros * max(1, vector_block(self.vector) // self.vector)
        return 2 * tokens * (self.rows * self.rank + tail) / rate + copied / rates.memory + 4 * rates.launch

    def _gathered_grads(self, tokens: int, rates: Rates, shared: int) -> float:
        """Returns seconds of the gradient of values by the same kernels."""
        size = self.dtype.itemsize
        gathered = tokens * self.nonzeros // self.vector * size
        sums = 2 * 4 * self.nonzeros * math.ceil(tokens / VECTOR_SPLIT)
        moved = (tokens * self.rows + 2 * tokens * self.columns / shared) * size + sums
        return gathered / rates.gathers + moved / rates.memory + 4 * rates.launch

    def _at_support(self, sectors: int, rates: Rates) -> float:
        """Returns seconds to go through a dense matrix at the support; ``sectors`` are moved for each entry."""
        if not self.nonzeros:
            return 0.0
        moved = self.nonzeros * (sectors * rates.sector + self.dtype.itemsize) if rates.sector else 0
        return self.nonzeros / rates.entries + moved / rates.memory + rates.launch

    def compose(self, rates: Rates) -> float:
        """Returns seconds to write W once: the product of its factors, to which the values are added."""
        product = self._product(self.rows, self.columns, self.rank / self.blocks, rates, rates.narrow)
        base = self._added(self.rows, self.columns, rates) if self.base else 0.0
        return product + base + self._at_support(2, rates)

    def composed(self, tokens: int, rates: Rates, composes: float = 1.0) -> float:
        """Returns seconds of a product with W, and of its share of the compositions."""
        return self._product(tokens, self.rows, self.columns, rates) + composes * self.compose(rates)

    def factored(
        self, tokens: int, rates: Rates, transposed: bool = False, shared: int = 1, hidden: float = 1.0
    ) -> float:
        """Returns seconds of the products through the rank, with S and a base.

        Args:
            tokens: Rows of x.
            rates: Of the device.
            transposed: Whether of x W, else of x W^T.
            shared: How many products share a copy of x, where kernels make one.
            hidden: Share of the hidden matrix's cost that it bears for many tokens; the gradients may bear the rest.
        """
        if self._is_gathered(tokens, rates):
            through = hidden * self._product(tokens, self.rank, self.rows if transposed else self.columns, rates)
            through += self._gathered(tokens, rates, transposed, shared)
        else:
            through = self._product(tokens, self.rank, self.columns, rates)
            through += self._product(tokens, self.rows, self.rank, rates)
            through += (self._tiled if transposed and rates.tiled else self._sparse)(tokens, rates)
        if self.base:
            through += self._product(tokens, self.rows, self.columns, rates)
            through += self._added(tokens, self.columns if transposed else self.rows, rates)
        return through

    def hidden(self, tokens: int, rates: Rates, transposed: bool = False) -> float:
        """Returns seconds of the hidden matrix alone, which ``factored`` counts, too."""
        return self._product(tokens, self.rank, self.rows if transposed else self.columns, rates)

    @property
    def compose_flops(self) -> int:
        """Operations to write W once."""
        return 2 * self.rows * self.columns * self.rank // self.blocks

    def factored_flops(self, tokens: int) -> int:
        """Counts the operations of one product through the rank and with S, or of the factors' gradients.

        That with a base is not among them: the gradients do without.
        """
        return 2 * tokens * (self.rank * (self.rows + self.columns) + self.nonzeros)

    def grads_composed(self, tokens: int, rates: Rates) -> float:
        """Returns seconds to make the dense gradient G, to project it on the factors and to read it at the support."""
        rank = self.rank / self.blocks
        projections = self._product(self.rows, rank, self.columns, rates, rates.narrow) + self._product(
            rank, self.columns, self.rows, rates, rates.narrow
        )
        return self._product(self.rows, self.columns, tokens, rates) + projections + self._at_support(1, rates)

    def grads_factored(self, tokens: int, rates: Rates, hiddens: int = 2, shared: int = 1) -> float:
        """Returns the seconds through the rank; ``hiddens`` of the two hidden matrices are still to be made."""
        is_gathered = self._is_gathered(tokens, rates)
        share = rates.narrow if is_gathered else 1.0
        through = self._product(self.rows, self.rank, tokens, rates, share)
        through += self._product(self.rank, self.columns, tokens, rates, share)
        if is_gathered:
            return through * (1 + share * hiddens / 2) + self._gathered_grads(tokens, rates, shared)
        dense = self._product(self.rows, self.columns, tokens, rates) + self._at_support(1, rates)
        return through * (1 + hiddens / 2) + (dense if rates.tiled else self._sparse(tokens, rates))


def crossover(
    first: Callable[[int], float], second: Callable[[int], float], limit: int = 2**31, least: int = 1
) -> int | None:
    """Returns the smallest number of tokens from which the other one of two costs is lower than at ``least``.

    Args:
        first, second: Seconds by the number of tokens; from ``least`` on they cross at most once.
        limit: More tokens than any matmul has.
        least: The fewest tokens.

    Returns:
        None where the same one is lower for every number from ``least`` on and below ``limit``.
    """

    def lower(tokens: int) -> bool:
        return first(tokens) < second(tokens)

    low, high = least, limit - 1
    if lower(high) == lower(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lower(middle) == lower(least) else (low, middle)
    return high
