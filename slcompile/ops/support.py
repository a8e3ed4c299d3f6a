"""Where the non-zeros of S are: stratified and vector (computed from a seed, stored nowhere), uniform, largest.

Stratified: each row of ``columns`` entries is cut into ``groups`` consecutive groups whose widths differ by at
most one, and holds exactly one non-zero in each. Group ``j`` of row ``i`` has its non-zero at

    start_j + ((h * width_j) >> 32),    h = mix32(((i * groups + j) mod 2**32) xor mix32(seed))

Vector: the same for blocks of ``vector`` consecutive rows, the last of which may be shorter: in the formula, ``i`` is
``row // vector``, so that the rows of a block share their columns. With ``vector = 1`` it is the stratified support.

Largest: one non-zero in each group of a row, as in the stratified support, where the weight was approximated worst. Its
place in the group is stored as a small offset; ops take it as they take the uniform support, by flat positions.

Uniform, the paper's: a random subset of all entries, stored as flat positions.

All of it is integer arithmetic, so the same seed gives the same support on every device and in every version;
``kernels/support.py`` has the same integers in Triton. ``mix32`` is the public 32-bit finaliser "lowbias32".
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SEED_LIMIT = 1 << 24
"""Seeds lie below this, so that they survive a round trip through float32 (an EMA over buffers makes one)."""

IMPORTED = -1
"""In the place of a seed: this support was not drawn here but read from a checkpoint, and is never drawn again."""

_MASK32 = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """Returns a bijection of [0, 2**32) whose output bits all depend on all input bits; int64 in, int64 out."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def groups_per_row(columns: int, density: float) -> int:
    """Groups, and so non-zeros, in a row of the stratified support: ``max(1, round(density * columns))``."""
    return max(1, round(density * columns))


def _zero(seed: Tensor) -> Tensor:
    """Makes an int64 zero that only the seed's value tells.

    Inductor takes sums and products of ``arange`` and numbers for indices, and computes those in 32 bits on GPUs.
    """
    return seed.reshape(()).to(torch.int64) & 0


def stratified_columns(
    seed: Tensor, rows: int, columns: int, groups: int, *, first_row: int = 0, vector: int = 1
) -> Tensor:
    """Returns columns of the non-zeros of rows ``first_row`` up to ``first_row + rows``, ascending in each row.

    Args:
        seed: One integer in [0, 2**24); its device is the result's.
        rows: Rows to compute.
        columns: Columns of the whole weight, below 2**31.
        groups: Non-zeros in each row, from ``groups_per_row``.
        first_row: Where to begin: a shard or a tile of the weight has the support of those rows of the whole.
        vector: Rows that share their columns.

    Returns:
        int64 of shape [rows, groups].
    """
    device = seed.device
    row = (torch.arange(first_row, first_row + rows, device=device).unsqueeze(1) + _zero(seed)) // vector
    group = torch.arange(groups, device=device) + _zero(seed)
    start = group * columns // groups
    width = (group + 1) * columns // groups - start
    # The remainders first: row * groups alone may pass 2**63.
    counter = ((row & _MASK32) * groups + group) & _MASK32
    mixed = mix32(counter ^ mix32(seed.reshape(()).to(torch.int64)))
    return start + ((mixed * width) >> 32)


def block_columns(seed: Tensor, rows: int, columns: int, groups: int, vector: int) -> Tensor:
    """Returns columns of the non-zeros of each block of ``vector`` rows; arguments as for ``stratified_columns``.

    Returns:
        int64 of shape [ceil(rows / vector), groups].
    """
    return stratified_columns(seed, -(-rows // vector), columns, groups)


def uniform_count(rows: int, columns: int, density: float) -> int:
    """Non-zeros of the uniform support: ``floor(density * rows * columns)``, as in the paper's code, at least 1."""
    return max(1, int(density * (rows * columns)))


def uniform_index(seed: int, rows: int, columns: int, density: float) -> Tensor:
    """Returns sorted flat positions ``row * columns + column`` of a uniformly random subset, without repetition.

    Returns:
        [uniform_count] on the CPU; int32, or int64 where the weight has more than 2**31 - 1 elements.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(rows * columns, generator=generator, device="cpu")
    chosen = order[: uniform_count(rows, columns, density)]
    return chosen.sort().values.to(uniform_dtype(rows, columns))


def uniform_dtype(rows: int, columns: int) -> torch.dtype:
    """Returns the smallest of int32 and int64 that holds every flat position."""
    return torch.int32 if rows * columns < 2**31 else torch.int64


def offset_dtype(columns: int, groups: int) -> torch.dtype:
    """Returns the smallest of uint8, uint16 and int32 that holds every offset in a group of a row."""
    widest = -(-columns // groups)
    return torch.uint8 if widest <= 1 << 8 else torch.uint16 if widest <= 1 << 16 else torch.int32


def group_widths(columns: int, groups: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Returns first column and width of each group of a row, int64 [groups]."""
    edges = torch.arange(groups + 1, device=device) * columns // groups
    return edges[:-1], edges.diff()


def largest_offsets(gains: Tensor, groups: int) -> Tensor:
    """Returns the offset of the largest entry in each group of each row; of equal ones, the first.

    Args:
        gains: [rows, columns], or a stack of such; not negative.
        groups: Non-zeros in each row, from ``groups_per_row``.

    Returns:
        int64 of shape [..., rows, groups].
    """
    starts, widths = group_widths(gains.shape[-1], groups, gains.device)
    inside = torch.arange(int(widths.max()), device=gains.device)
    columns = (starts.unsqueeze(1) + inside).clamp_max(gains.shape[-1] - 1)
    outside = inside >= widths.unsqueeze(1)
    return gains[..., columns].masked_fill(outside, -1.0).argmax(-1)


def offset_index(offsets: Tensor, rows: int, columns: int, groups: int) -> Tensor:
    """Returns the flat positions, ascending, that offsets in groups stand for.

    Args:
        offsets: Integers [rows * groups], row by row.
        rows, columns: Of the weight; those of a stack of matrices follow one another.
        groups: Non-zeros in each row.

    Returns:
        int32 or int64 of shape [rows * groups].
    """
    starts, _ = group_widths(columns, groups, offsets.device)
    row_start = torch.arange(rows, device=offsets.device).unsqueeze(1) * columns
    found = offsets.view(rows, groups).to(torch.int64) + starts + row_start
    return found.flatten().to(uniform_dtype(rows, columns))


def flat_positions(values: Tensor, support: Tensor, columns: int, vector: int = 1) -> Tensor:
    """Returns flat positions of ``values`` in a row-major weight.

    Args:
        values: [rows, groups] for the stratified and vector support, [non-zeros] for the uniform and largest ones. The
            rows of a stack of matrices, [matrices, rows, groups], follow one another.
        support: The seed, one element, for stratified and vector; the flat index, like ``values``, for the others.
        columns: Columns of the weight.
        vector: Rows that share their columns; 1 for stratified.

    Returns:
        int32 or int64 of shape [values.numel()], without repetition, ascending; of no groups, no positions.
    """
    if values.dim() == 1:
        return support
    if not values.numel():
        return support.new_empty(0)
    groups = values.shape[-1]
    rows = values.numel() // groups
    row_start = (torch.arange(rows, device=values.device).unsqueeze(1) + _zero(support)) * columns
    column = block_columns(support, rows, columns, groups, vector)
    if vector > 1:
        column = column.repeat_interleave(vector, 0)[:rows]
    return (row_start + column).flatten()


def draw_seed(seed: int | None, name: str) -> int:
    """Returns a weight's seed: from torch's default generator, or a hash of the user's seed and the weight's name.

    Several processes must agree on a weight's support, and their generators need not: there None is as 0.
    """
    if seed is None and not _among_several():
        return int(torch.randint(SEED_LIMIT, (), device="cpu"))
    digest = hashlib.blake2b(f"{seed or 0}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT


def _among_several() -> bool:
    """Returns whether this is one of several processes that train a model, as far as it can be known."""
    distributed = torch.distributed
    if not distributed.is_available():
        return False
    return distributed.is_torchelastic_launched() or (distributed.is_initialized() and distributed.get_world_size() > 1)
