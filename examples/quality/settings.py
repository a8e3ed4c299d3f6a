"""What one run is: a model of the ladder, a corpus, and everything that decides its numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import slcompile
from slcompile.config import FULL_STEP_INPUTS

BATCH, SEQ_LEN, VOCAB = 8, 128, 1024
WARMUP = 0.1  # of the steps, before a cosine to a tenth
BETAS, CLIP = (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Rung:
    """The shape of a LLaMA of the ladder."""

    intermediate: int
    layers: int
    heads: int


RUNGS = {96: Rung(256, 3, 4), 128: Rung(344, 3, 4), 192: Rung(512, 4, 4), 256: Rung(688, 5, 4)}
"""By width: 0.3, 0.6, 1.8 and 4.0 million weights in the projections. A dense model of 96 has as many parameters in all
as a factorized one of 128 with rank and density as they are by default."""

STEPS = {"dense": math.inf, "half": FULL_STEP_INPUTS / 2}
"""Up to how many inputs an alpha of this name makes steps as large as a dense weight's."""
CORPORA = ("prose", "code")
KINDS = ("dense", "sl", "low rank", "galore")
BITS = (32, 8, 4)
DECAYS = ("product", "factors")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a run but the code and the corpus' text.

    Args:
        kind: ``"dense"``; ``"sl"``; ``"low rank"``: sl whose sparse part is zero and stays so; ``"galore"``: dense, and
            AdamW's moments are those of gradients projected to the rank.
        corpus, width, steps, seed: Of the run; a width is a rung of the ladder.
        lr, embed_lr: Peak learning rates of the projections, and of embedding, head and norms.
        init_std: Of random dense weights; embedding and head have it in every row.
        rank, density, alpha, support, vector, init: Of the factors, as in ``slcompile.SLConfig``, and the other rules
            of alpha that runs had, ``STEPS``.
        b_rate, a_rate, values_rate: Learning rates of the factors relative to ``lr``.
        values_start: The values' start is multiplied by it.
        restart: Steps between restarts of the factors; 0: none.
        precondition: Damping of preconditioned gradients of the factors, relative; 0: none are.
        weight_decay: AdamW's, of the projections, at their rate ``lr``.
        decay: Of what: of the ``"product"``, B and values alone, so that ``s B A + S`` decays as a dense weight does;
            or of all three ``"factors"``, by which the low-rank part decays twice as fast.
        bits: Of a number in AdamW's states: 32, or 8 or 4 with torchao's.
    """

    kind: str
    corpus: str
    width: int
    steps: int
    lr: float
    embed_lr: float
    seed: int = 0
    init_std: float = 0.006
    rank: float = 0.25
    density: float = 0.03
    alpha: float | str = "auto"
    support: str = "stratified"
    vector: int = 16
    init: str = "kaiming"
    b_rate: float = 1.0
    a_rate: float = 1.0
    values_rate: float = 1.0
    values_start: float = 1.0
    restart: int = 0
    precondition: float = 0.0
    weight_decay: float = 0.0
    decay: str = "product"
    bits: int = 32

    def __post_init__(self) -> None:
        for name in ("width", "steps", "seed", "vector", "restart", "bits"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an int, got {getattr(self, name)!r}")
        for name, allowed in (("kind", KINDS), ("width", tuple(RUNGS)), ("bits", BITS), ("decay", DECAYS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("lr", "embed_lr", "init_std", "b_rate", "a_rate", "values_rate", "values_start"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        for name in ("restart", "precondition", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if self.steps < 10:
            raise ValueError(f"steps must be at least 10, got {self.steps!r}")
        if self.kind == "galore" and self.bits != BITS[0]:
            raise ValueError(f"bits must be {BITS[0]} with kind 'galore', which has no other states, got {self.bits}")
        self.sl_config()

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """Settings from a dict, such as a recorded run, which has more keys."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @property
    def has_dense_weights(self) -> bool:
        """Whether no weight is factorized."""
        return self.kind in ("dense", "galore")

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.steps * BATCH * SEQ_LEN

    @property
    def square_rank(self) -> int:
        """The rank of the width's square weights, which no weight exceeds."""
        return slcompile.SLConfig(rank=self.rank).rank_for(self.width, self.width)

    def sl_config(self) -> slcompile.SLConfig:
        """The options of the conversion."""
        names = ("rank", "density", "alpha", "support", "vector", "init", "seed")
        given = {name: getattr(self, name) for name in names}
        if self.alpha in STEPS:
            given["alpha"] = {
                "*down_proj*": self.alpha_of(RUNGS[self.width].intermediate),
                "*": self.alpha_of(self.width),
            }
        return slcompile.SLConfig(**given)

    def alpha_of(self, inputs: int) -> float:
        """The alpha, by one of the other rules, of a weight that reads so many inputs."""
        size = min(inputs, STEPS[str(self.alpha)]) / min(inputs, FULL_STEP_INPUTS)
        return self.square_rank * slcompile.SLConfig().scale_for(self.square_rank, inputs) * size

    def deciding(self) -> dict[str, Any]:
        """The settings that have an effect on a run of this kind; two runs with equal ones are one."""
        values = asdict(self)
        factors = ("density", "alpha", "support", "init", "b_rate", "a_rate", "values_rate", "values_start")
        if self.has_dense_weights or self.support != "vector":
            del values["vector"]
        if self.has_dense_weights:
            for name in (*factors, "restart", "precondition", "decay"):
                del values[name]
        if self.kind == "dense":
            del values["rank"]
        # Runs of before do not say these.
        if self.bits == BITS[0]:
            del values["bits"]
        if not self.weight_decay:
            del values["weight_decay"]
            values.pop("decay", None)
        return values
