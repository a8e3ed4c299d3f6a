"""The rates of this machine's devices: those that ``slcompile rates --measure`` stored, else those of their class."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
from pathlib import Path

import torch

from slcompile.cost.devices import DEVICE_CLASSES, device_class
from slcompile.cost.matmul import Rates


def rates(device: torch.device) -> Rates:
    """Returns the rates of a device: those that ``measure_rates`` stored on this machine, else defaults of its class.

    Both are fixed, so that a model is lowered alike in every run and on every rank.
    """
    return _rates(_key(device))


def fingerprint() -> str:
    """Returns what the choices of this process depend on: the rates of its CPU and of its GPU."""
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
    """Returns what is assumed of a device of this class."""
    return _defaults(_key(device))


def _defaults(key: tuple[str, ...]) -> Rates:
    found = next(each for each in DEVICE_CLASSES if each.name == key[0])
    return found.rates.times(int(key[-1])) if found.per_thread else found.rates


def stored_rates(device: torch.device) -> Path | None:
    """Returns the file that ``measure_rates`` stored for this device on this machine, if there is one."""
    path = _path(_key(device))
    return path if path.exists() else None


def _key(device: torch.device) -> tuple[str, ...]:
    found = device_class(device)
    if found.per_thread:
        return found.name, platform.machine(), str(torch.get_num_threads())
    if not torch.cuda.is_available():
        return found.name, "none"
    return found.name, torch.cuda.get_device_name(
        device if device.type == "cuda" else None
    )  # meta: that of this machine


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
