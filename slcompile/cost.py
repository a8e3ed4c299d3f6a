"""What each lowering of a matmul with a factorized weight takes: FLOPs, bytes, and seconds at a device's rates.

T tokens, a weight W_NK of rank R with P non-zeros. Composed: a dense product, and W composed once a phase. Factored:
two products through the rank and one with S. Every time is the larger of operations at the device's rate and bytes at
its bandwidth (the roofline); times of one matmul's parts are added.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slcompile import torch_private

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
        vector: FLOP/s of the same where rows share their columns (the vector support); of ``sparse`` where they are
            not given. Such a product on CPU reads neither positions nor another layout.
    """

    matmul: Mapping[str, float]
    sparse: Mapping[str, float]
    memory: float
    entries: float = float("inf")
    index_bytes: int = 0
    transposes: int = 0
    vector: Mapping[str, float] = field(default_factory=dict)


def _cpu(threads: int) -> Rates:
    # Of one thread of a server core with AVX-512; what counts is how the rates compare with each other.
    bfloat16 = 700e9 if torch_private.has_amx() else 180e9
    matmul = {"float64": 40e9, "float32": 85e9, "float16": 1e9, "bfloat16": bfloat16}
    sparse = {"float64": 5e9, "float32": 22e9, "float16": 30e9, "bfloat16": 30e9}
    vector = {"float64": 15e9, "float32": 35e9, "float16": 10e9, "bfloat16": 35e9}
    matmul, sparse, vector = (
        {name: rate * threads for name, rate in each.items()} for each in (matmul, sparse, vector)
    )
    return Rates(
        matmul, sparse, memory=6e9 * threads, entries=60e6 * threads, index_bytes=4, transposes=1, vector=vector
    )


# Dense rates are 0.7 of the data sheets', bandwidths 0.85; float32 without TF32. Sparse rates are estimates: they were
# not measured.
_GPUS = {
    "sm_90": Rates(
        {"float64": 40e12, "float32": 45e12, "float16": 690e12, "bfloat16": 690e12},
        {"float64": 0.5e12, "float32": 1e12, "float16": 1e12, "bfloat16": 1e12},
        memory=2.8e12,
    ),
    "sm_80": Rates(
        {"float64": 13e12, "float32": 14e12, "float16": 220e12, "bfloat16": 220e12},
        {"float64": 0.3e12, "float32": 0.6e12, "float16": 0.6e12, "bfloat16": 0.6e12},
        memory=1.7e12,
    ),
    "gfx942": Rates(
        {"float64": 80e12, "float32": 110e12, "float16": 900e12, "bfloat16": 900e12},
        {"float64": 0.5e12, "float32": 1e12, "float16": 1e12, "bfloat16": 1e12},
        memory=4.5e12,
    ),
}


@dataclass(frozen=True)
class Matmul:
    """One matmul with a factorized weight, or the product that makes its gradient: N rows, K columns, rank R.

    ``vector`` rows share their columns: 1 but for the vector support.
    """

    rows: int
    columns: int
    rank: int
    nonzeros: int
    dtype: torch.dtype
    vector: int = 1

    @property
    def _name(self) -> str:
        return DTYPES[self.dtype]

    def _product(self, m: int, n: int, k: int, rates: Rates) -> float:
        moved = (m * k + k * n + m * n) * self.dtype.itemsize
        return max(2 * m * n * k / rates.matmul[self._name], moved / rates.memory)

    def _sparse(self, tokens: int, rates: Rates) -> float:
        if self.vector > 1 and self._name in rates.vector:
            moved = (tokens * (self.rows + self.columns) + self.nonzeros) * self.dtype.itemsize
            return max(2 * tokens * self.nonzeros / rates.vector[self._name], moved / rates.memory)
        copied = 2 * tokens * (self.rows + self.columns) * self.dtype.itemsize * rates.transposes
        read = self.nonzeros * (self.dtype.itemsize + rates.index_bytes)
        operations = 2 * tokens * self.nonzeros / rates.sparse[self._name]
        return max(operations, read / rates.memory) + copied / rates.memory

    def compose(self, rates: Rates) -> float:
        """Seconds to write W once."""
        return self._product(self.rows, self.columns, self.rank, rates) + self.nonzeros / rates.entries

    def composed(self, tokens: int, rates: Rates, composes: float = 1.0) -> float:
        """Seconds of a product with W, and of its share of the compositions."""
        return self._product(tokens, self.rows, self.columns, rates) + composes * self.compose(rates)

    def factored(self, tokens: int, rates: Rates) -> float:
        """Seconds of the products through the rank and with S."""
        through = self._product(tokens, self.rank, self.columns, rates) + self._product(
            tokens, self.rows, self.rank, rates
        )
        return through + self._sparse(tokens, rates)

    @property
    def compose_flops(self) -> int:
        """Operations to write W once."""
        return 2 * self.rows * self.columns * self.rank

    @property
    def project_flops(self) -> int:
        """Operations to project the dense gradient G on B and A."""
        return 4 * self.rows * self.columns * self.rank

    def factored_flops(self, tokens: int) -> int:
        """Operations of one product through the rank and with S; of the factors' gradients made likewise, too."""
        return 2 * tokens * (self.rank * (self.rows + self.columns) + self.nonzeros)

    def grads_composed(self, tokens: int, rates: Rates) -> float:
        """Seconds to make the dense gradient G and to project it on the factors."""
        projections = self._product(self.rows, self.rank, self.columns, rates) + self._product(
            self.rank, self.columns, self.rows, rates
        )
        dense = self._product(self.rows, self.columns, tokens, rates)
        return dense + projections + self.nonzeros / rates.entries

    def grads_factored(self, tokens: int, rates: Rates, hiddens: int = 2) -> float:
        """Seconds to go through the rank; ``hiddens`` of its two hidden matrices are not at hand from the matmuls."""
        through = self._product(self.rows, self.rank, tokens, rates) + self._product(
            self.rank, self.columns, tokens, rates
        )
        return through * (1 + hiddens / 2) + self._sparse(tokens, rates)


def crossover(first: Callable[[int], float], second: Callable[[int], float], limit: int = 2**31) -> int | None:
    """The smallest number of tokens from which the other one of two costs is lower than at one token.

    Args:
        first, second: Seconds by the number of tokens; they cross at most once.
        limit: More tokens than any matmul has.

    Returns:
        None where the same one is lower for every number below ``limit``.
    """

    def lower(tokens: int) -> bool:
        return first(tokens) < second(tokens)

    low, high = 1, limit - 1
    if lower(high) == lower(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lower(middle) == lower(1) else (low, middle)
    return high


def rates(device: torch.device) -> Rates:
    """The rates of a device: those that ``measure_rates`` stored on this machine, else defaults of its class.

    Both are fixed, so that a model is lowered alike in every run and on every rank.
    """
    return _rates(_key(device))


def fingerprint() -> str:
    """What the choices of this process depend on: the rates of its CPU and of its GPU."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return repr([rates(torch.device(device)) for device in devices])


@functools.cache
def _rates(key: tuple[str, ...]) -> Rates:
    path = _path(key)
    try:
        return Rates(**json.loads(path.read_text())) if path.exists() else _defaults(key)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no rates ({error}); delete it, or run `slcompile rates --measure`") from error


def default_rates(device: torch.device) -> Rates:
    """What is assumed of a device of this class."""
    return _defaults(_key(device))


def _defaults(key: tuple[str, ...]) -> Rates:
    return _cpu(int(key[-1])) if key[0] == "cpu" else _GPUS[key[0]]


def stored_rates(device: torch.device) -> Path | None:
    """The file that ``measure_rates`` stored for this device on this machine, if there is one."""
    path = _path(_key(device))
    return path if path.exists() else None


def device_class(device: torch.device) -> str:
    """``"cpu"``, or the class of GPUs whose kernel configurations and rates fit best; sm_80 where there is no GPU.

    Models on the meta device are taken for ones on this machine's accelerator, on its CPU where it has none.
    """
    if device.type == "cpu" or (device.type == "meta" and not torch.accelerator.is_available()):
        return "cpu"
    device = torch.device("cuda") if device.type == "meta" else device
    if torch.version.hip:
        return "gfx942"
    has_gpu = torch.cuda.is_available()
    return "sm_90" if has_gpu and torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def _key(device: torch.device) -> tuple[str, ...]:
    kind = device_class(device)
    if kind == "cpu":
        return kind, platform.machine(), str(torch.get_num_threads())
    return kind, torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"


def _path(key: tuple[str, ...]) -> Path:
    folder = Path(os.environ.get("SLCOMPILE_CACHE_DIR") or Path.home() / ".cache" / "slcompile")
    return folder / f"rates-{'-'.join(key).replace(' ', '_')}-torch{torch.__version__}.json"


def store_rates(device: torch.device, measured: Rates) -> Path:
    """Keeps measured rates for later compiles on this machine; returns the JSON file that holds them."""
    path = _path(_key(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(dataclasses.asdict(measured), indent=1))
    beside.replace(path)
    _rates.cache_clear()
    return path
