"""What to factorize and how: the options of ``backend="sltrain"``, checked before anything is changed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

SUPPORTS = ("vector", "stratified", "uniform", "largest")
VECTOR = 16
"""Rows that share their columns in the vector support, unless the user says otherwise."""
VECTORS = (1, 2, 4, 8, 16, 32, 64, 128)
INITS = ("auto", "kaiming", "spectral")
LOWERINGS = ("auto", "composed", "factored")
SAVES = ("auto", "all", "low_rank")
COMPILED = ("lowering", "keep_weights", "save", "memory_budget", "autotune", "skip_passes")
"""The fields that say how graphs are compiled, and not what a weight becomes."""
SKIPPABLE = (
    "flatten_convolutions",
    "fuse_weight_grads",
    "choose_lowering",
    "group_projections",
    "recompute_weights",
    "recompute_inputs",
    "save_low_rank",
    "lower_ops",
    "read_transposed",
)
"""Passes without which a graph computes the same: those on the joint graph, and those on its two parts."""

STRUCTURES: dict[str, Any] = {}
"""Name of each weight structure -> its class; ``weight/structure.py`` says what that is, and fills the table."""
AUTO = "auto"
BASES = ("frozen", "int8", "nf4")
FULL_STEP_INPUTS = 128
"""Inputs up to which ``alpha="auto"`` gives a weight steps as large as a dense one's; docs/quality.md has the runs."""
BY_PATTERN = ("rank", "density", "alpha")
"""Options that may be a mapping from fnmatch patterns on names to values."""


@dataclass(frozen=True, kw_only=True)
class SLConfig:
    """Options of a sparse-plus-low-rank conversion, ``W = scale * B @ A + S``.

    ``rank``, ``density`` and ``alpha`` may each be a mapping from fnmatch patterns on fully qualified names to values,
    of which the first that matches counts: ``{"*q_proj*": 0.1, "*": 0.25}``. A weight that none matches stays dense.

    Args:
        rank: Columns of ``B`` and rows of ``A``: an int, or a fraction of ``min(rows, columns)`` in (0, 1).
        density: Share of the entries of ``W`` that ``S`` holds, in (0, 1]; 0 for no sparse part, with a frozen base.
        alpha: Of the scale. ``"auto"`` derives it from rank and inputs, so that a dense model's learning rate serves
            (``scale_for``), and with a base LoRA's does. With a number it is ``alpha / rank``; the paper has 32 (60M),
            16 (130M, 350M), 8 (1B, 7B).
        support: Where the non-zeros of ``S`` are. ``"vector"`` has one in each of ``density * columns`` groups of a
            row, the same for blocks of ``vector`` rows, which vector units multiply fast; no index is stored.
            ``"stratified"`` draws them for each row; ``"uniform"`` is the paper's random subset, stored as int32.
            ``"largest"`` takes in each group of a row the entry that the low-rank part approximates worst: of trained
            weights only, and stored as one byte a non-zero.
        vector: Rows of a block of the vector support, a power of two up to 128; the last block of a weight may have
            fewer. 1 is the stratified support. Only with ``support="vector"``.
        init: ``"kaiming"`` is the paper's start for random weights, ``"spectral"`` the best approximation of
            the weight that is there, ``"auto"`` spectral if any weight looks trained, else kaiming.
        seed: None draws each weight's seed from torch's default generator; an int is hashed with its name. Among
            several processes, which must agree on supports, None is as 0.
        include: fnmatch patterns on fully qualified names; a weight must match one of them ...
        exclude: ... and none of these.
        min_dim: Weights with fewer rows or columns than this stay dense (classifier heads, gates).
        lowering: How matmuls with factorized weights run: ``"composed"`` writes W and multiplies with it,
            ``"factored"`` multiplies with the factors and never forms W, ``"auto"`` takes for each matmul what
            ``slcompile.cost`` predicts to be faster.
        keep_weights: Whether composed weights are kept for the backward pass, at the memory of the dense weights,
            and not composed again there.
        save: What the forward pass saves for the backward pass, beside what others read. ``"all"``: whatever the
            partitioner chooses. ``"auto"``: not the inputs of matmuls with factorized weights that norms and pointwise
            ops make of what is saved anyway. ``"low_rank"``: nor results of factored matmuls, which are computed
            again from the hidden matrices, ``rank`` wide.
        memory_budget: Bytes that a training step may take at its peak, or a string such as ``"6GB"`` or ``"512MiB"``;
            with ``save="auto"``, which then computes again in the backward pass what is needed for that, and no
            more. Counted as in ``estimate_memory``, but for what the optimizer's step allocates; kept as an int.
        autotune: Whether Triton kernels time several configurations, once for each shape, instead of taking the
            device's default.
        dryrun: Whether ``backend="sltrain"`` only reports what it would replace: the model then trains dense.
        structure: What takes a dense weight's place; ``"sparse_low_rank"`` is SLTrain's, docs/structures.md has the
            others. Of those that have no sparse part, density, support and vector must be left as they are.
        blocks: Into how many a structure cuts a weight, where it does: the blocks of ``"block_low_rank"`` (None: 4),
            the heads of ``"cp"`` (None: the divisor of the rows that is nearest to their square root).
        base: ``"frozen"`` keeps the model's own weight ``W0`` and trains what is added to it, ``W = W0 + scale * B @ A
            + S``, which is zero at first; with ``density=0`` that is LoRA (arXiv 2106.09685). Weights that do not
            require a gradient get factors, too. ``"int8"`` and ``"nf4"`` do the same and hold ``W0`` in 8 or 4 bits a
            number, with a scale for each 64 (QLoRA, arXiv 2305.14314). None replaces the weight.
        skip_passes: Names of passes that are left out, to find the one that is to blame for a wrong number.

    Raises:
        ValueError: A field has a value that is not allowed; the message names it.
    """

    rank: int | float | Mapping[str, int | float] = 0.25
    density: float | Mapping[str, float] = 0.03
    alpha: float | str | Mapping[str, float | str] = AUTO
    support: str = "vector"
    vector: int = VECTOR
    init: str = "auto"
    seed: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("*lm_head*", "*embed*")
    min_dim: int = 32
    lowering: str = "auto"
    keep_weights: bool = False
    save: str = "auto"
    memory_budget: int | str | None = None
    autotune: bool = False
    dryrun: bool = False
    structure: str = "sparse_low_rank"
    blocks: int | None = None
    base: str | None = None
    skip_passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name in BY_PATTERN:
            self._require_setting(name)
        require_choice("support", self.support, SUPPORTS)
        _require(_is_int(self.vector) and self.vector in VECTORS, "vector", self.vector, f"one of {VECTORS}")
        if self.vector != VECTOR and self.support != "vector":
            raise ValueError(f"vector={self.vector} needs support='vector', got support={self.support!r}")
        require_choice("init", self.init, INITS)
        if self.support == "largest" and (self.init == "kaiming" or self.base is not None):
            other = "init='kaiming'" if self.init == "kaiming" else f"base={self.base!r}"
            raise ValueError(
                f"support='largest' puts the non-zeros where the approximation of a trained weight is worst, and "
                f"{other} approximates none: take another support"
            )
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63),
            "seed",
            self.seed,
            "None or an int in [0, 2**63)",
        )
        _require(_is_int(self.min_dim) and self.min_dim >= 1, "min_dim", self.min_dim, "an int >= 1")
        require_choice("lowering", self.lowering, LOWERINGS)
        require_choice("save", self.save, SAVES)
        object.__setattr__(self, "memory_budget", _bytes(self.memory_budget))
        if self.memory_budget is not None and self.save != "auto":
            raise ValueError(f"memory_budget={self.memory_budget} needs save='auto', got save={self.save!r}")
        require_choice("structure", self.structure, STRUCTURES)
        is_count = self.blocks is None or (_is_int(self.blocks) and self.blocks >= 2)
        _require(is_count, "blocks", self.blocks, "None or an int >= 2")
        self._require_meaning()
        if self.base is not None:
            require_choice("base", self.base, BASES)
            self._require_possible_base()
        skipped = (self.skip_passes,) if isinstance(self.skip_passes, str) else self.skip_passes
        _require(isinstance(skipped, (list, tuple)), "skip_passes", skipped, "a sequence of names of passes")
        for name in skipped:
            require_choice("skip_passes", name, SKIPPABLE)
        object.__setattr__(self, "skip_passes", tuple(skipped))
        for name in ("keep_weights", "autotune", "dryrun"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")

    def _require_setting(self, name: str) -> None:
        """Raises ValueError where an option that may be a mapping has a value that is not allowed."""
        is_allowed, allowed = {
            "rank": (_is_rank, "an int >= 1, or a fraction of min(rows, columns) in (0, 1)"),
            "density": (self._is_density, "a number in (0, 1], or 0 with base='frozen'"),
            "alpha": (_is_alpha, "a number > 0 and at most 1e9, or 'auto'"),
        }[name]
        given = getattr(self, name)
        if not isinstance(given, Mapping):
            _require(is_allowed(given), name, given, allowed)
            return
        _require(bool(given), name, given, f"{allowed}, or a mapping of patterns to such values")
        for pattern, value in given.items():
            _require(isinstance(pattern, str) and bool(pattern), f"{name} pattern", pattern, "a non-empty string")
            _require(is_allowed(value), f"{name}[{pattern!r}]", value, allowed)
        object.__setattr__(self, name, dict(given))

    def _is_density(self, value: Any) -> bool:
        return _is_number(value) and (0 < value <= 1 or (value == 0 and self.base is not None))

    @property
    def is_by_pattern(self) -> bool:
        """Whether a weight's name decides on one of its settings."""
        return any(isinstance(getattr(self, name), Mapping) for name in BY_PATTERN)

    def at(self, *names: str) -> SLConfig | None:
        """Returns the options of the weight of these names, each setting plain; None where no pattern matches."""
        plain: dict[str, Any] = {}
        for field in BY_PATTERN:
            given = getattr(self, field)
            if not isinstance(given, Mapping):
                continue
            matching = (value for pattern, value in given.items() if any(fnmatchcase(name, pattern) for name in names))
            value = next(matching, None)
            if value is None:
                return None
            plain[field] = value
        return replace(self, **plain) if plain else self

    def _require_meaning(self) -> None:
        """Raises ValueError where an option is given that the structure does not have."""
        structure = STRUCTURES[self.structure]
        names = [] if structure.takes_blocks else ["blocks"]
        names += [] if structure.takes_density or self.density == 0 else ["density"]
        names += [] if structure.takes_density else ["support", "vector"]
        for name in names:
            if getattr(self, name) != getattr(SLConfig, name):
                lacks = "is not cut into blocks" if name == "blocks" else "has no sparse part"
                raise ValueError(
                    f"{name}={getattr(self, name)!r} means nothing for structure={self.structure!r}, which {lacks}"
                )

    def _require_possible_base(self) -> None:
        if not STRUCTURES[self.structure].takes_base:
            raise ValueError(f"base={self.base!r} needs a structure that adds to a weight, got {self.structure!r}")
        if self.init == "spectral":
            raise ValueError(
                f"init='spectral' approximates the weight, which base={self.base!r} keeps as it is: what is added to "
                "it starts at zero"
            )
        densities = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        if not any(densities) and self.support != SLConfig.support:
            raise ValueError(f"support={self.support!r} needs a density above 0: without a sparse part there is none")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> tuple[SLConfig, dict[str, Any]]:
        """Splits the ``options`` of torch.compile into a config and Inductor's own settings (``"inductor"``).

        Raises:
            ValueError: An unknown key (the nearest known one is suggested) or a bad value.
        """
        options = dict(options or {})
        inductor = options.pop("inductor", {})
        if not isinstance(inductor, Mapping):
            raise ValueError(f"option 'inductor' must be a dict of Inductor settings, got {inductor!r:.200}")
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"unknown option {key!r:.200}{did_you_mean(key, [*known, 'inductor'])}")
        return cls(**options), dict(inductor)

    def to_options(self) -> dict[str, Any]:
        """Returns every field by its name, as ``from_options`` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def plain_density(self) -> float:
        """The density, of the options of one weight."""
        assert not isinstance(self.density, Mapping), "the options of one weight are those that `at` returns"
        return self.density

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        assert not isinstance(self.memory_budget, str), "it was parsed when this was made"
        return self.memory_budget

    def rank_for(self, rows: int, columns: int) -> int:
        """Returns the rank of a weight of this shape."""
        assert not isinstance(self.rank, Mapping), "the options of one weight are those that `at` returns"
        if isinstance(self.rank, int):
            return self.rank
        return max(1, round(self.rank * min(rows, columns)))

    def scale_for(self, rank: int, inputs: int) -> float:
        """Returns the factor on ``B @ A`` of a weight with this rank that reads this many inputs.

        ``alpha / rank``; for ``"auto"`` the factor with which an optimizer that moves each entry by about its learning
        rate, as Adam and its kin do, at first moves the weight as far as it would move a dense one of at most
        ``FULL_STEP_INPUTS`` inputs. An aligned step of size ``lr`` changes a dense [outputs, inputs] by
        ``lr * sqrt(outputs * inputs)`` in spectral norm, and ``scale * B @ A``, where B = 0, by
        ``scale * lr * sqrt(outputs * rank) * norm(A)``. A starts with entries U(+-1/sqrt(inputs)), whose norm is
        ``(sqrt(inputs) + sqrt(rank)) / sqrt(3 * inputs)``. What an output changes by at inputs of size 1 is
        ``sqrt(inputs / outputs)`` times such a norm: it grows with the inputs under one ``lr``, which is why a wider
        dense model takes a lower one (arXiv 2310.17813). Here it stays what it is at ``FULL_STEP_INPUTS``. The result
        is a multiple of 1/4096, so that ``alpha = scale * rank`` is exact, and a checkpoint that holds it brings it
        back to the bit.

        With a base, ``"auto"`` is 2, LoRA's usual ``lora_alpha = 2 * r``, for whose learning rates there is experience:
        those are ten times a dense model's and more, and ``A`` is to learn, too.
        """
        assert not isinstance(self.alpha, Mapping), "the options of one weight are those that `at` returns"
        if not isinstance(self.alpha, str):
            return self.alpha / rank
        if self.base is not None:
            return 2.0
        norm = (math.sqrt(inputs) + math.sqrt(rank)) / math.sqrt(3 * inputs)
        size = min(inputs, FULL_STEP_INPUTS) / inputs  # of the step, relative to a dense weight's
        return max(1, round(4096 * size * math.sqrt(inputs / rank) / norm)) / 4096

    def includes(self, *names: str) -> bool:
        """Returns whether the patterns admit the weight of these fully qualified names; a tied weight has several."""
        return any(_matches(name, self.include) for name in names) and not any(
            _matches(name, self.exclude) for name in names
        )

    def require_patterns_match(self, names: Iterable[str]) -> None:
        """Raises ValueError where a pattern that the user gave matches none of ``names``."""
        names = list(names)
        defaults = {pattern for field in fields(self) if isinstance(field.default, tuple) for pattern in field.default}
        settings = {name: getattr(self, name) for name in BY_PATTERN if isinstance(getattr(self, name), Mapping)}
        for field, patterns in {"include": self.include, "exclude": self.exclude, **settings}.items():
            for pattern in patterns:
                if pattern not in defaults and not any(fnmatchcase(name, pattern) for name in names):
                    hint = did_you_mean(pattern.strip("*"), names)
                    raise ValueError(f"{field} pattern {pattern!r} matches no parameter of the model{hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a suffix for an error message: the nearest of ``known``, and all of them where they are few."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    allowed = f"; allowed: {', '.join(known)}" if len(known) <= 24 else ""
    return (f", did you mean {near[0]!r}?" if near else "") + allowed


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} must be a sequence of non-empty fnmatch patterns, got {value!r:.200}")
    return tuple(value)


def _is_rank(value: Any) -> bool:
    return value >= 1 if _is_int(value) else _is_number(value) and 0 < value < 1


MOST_ALPHA = 1e9
"""More, and a scale is soon beyond float32, in which kernels take it."""


def _is_alpha(value: Any) -> bool:
    return value == AUTO if isinstance(value, str) else _is_number(value) and 0 < value <= MOST_ALPHA


_UNITS = {"B": 1} | {
    letter + suffix: base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def _bytes(given: Any) -> int | None:
    """Returns a memory budget in bytes."""
    allowed = "None, a number of bytes >= 1, or such a number with a unit, as in '6GB' or '512MiB'"
    size: float = math.nan
    if isinstance(given, str) and (parts := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", given)):
        number, unit = parts.groups()
        known = {name.lower(): scale for name, scale in _UNITS.items()}
        if unit and unit.lower() not in known:
            raise ValueError(f"memory_budget got {given!r:.200} with the unit {unit!r}{did_you_mean(unit, _UNITS)}")
        size = float(number) * known[unit.lower() or "b"]
    elif _is_number(given):
        size = given
    _require(given is None or (math.isfinite(size) and size >= 1), "memory_budget", given, allowed)
    return None if given is None else int(size)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require_int(name: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raises ValueError where an argument is no int of at least so much; an optional one may be None."""
    if not (_is_int(value) and value >= least) and not (optional and value is None):
        raise ValueError(f"{name} must be an int >= {least}{' or None' if optional else ''}, got {value!r}")


def require_number(name: str, value: Any, most: float = math.inf, *, optional: bool = False) -> None:
    """Raises ValueError where an argument is no finite number in (0, most]; an optional one may be None."""
    if not (_is_number(value) and 0 < value <= most) and not (optional and value is None):
        allowed = "finite number above 0" if most == math.inf else f"number in (0, {most}]"
        raise ValueError(f"{name} must be a {allowed}{' or None' if optional else ''}, got {value!r:.200}")


def _is_number(value: Any) -> bool:
    # An int may be too large for a float, which isfinite does not bear.
    return (isinstance(value, float) and math.isfinite(value)) or (_is_int(value) and abs(value) < 2**1023)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r:.200}")


def require_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError where an argument is none of the allowed words; it names the nearest."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} got {value!r:.200}{did_you_mean(value, allowed)}")


def checked_config(config: SLConfig | None) -> SLConfig:
    """Returns the config, the default one for None."""
    if config is not None and not isinstance(config, SLConfig):
        raise ValueError(f"config must be an SLConfig, got {type(config).__name__}")
    return config if config is not None else SLConfig()
