"""What torchrun starts for ``test_updates.py``: per-layer updates beside plain ones, under DDP and FSDP2."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard

import slcompile
from slcompile.optim import per_layer

STEPS, PASSES = 3, 2
CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=0)
DDP = partial(nn.parallel.DistributedDataParallel, bucket_cap_mb=0.05)  # so that there are several buckets

Make = Callable[..., torch.optim.Optimizer]


def model_of(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    model = ranks.example.Transformer(width=width, heads=2, layers=2, context=16).double()
    return slcompile.factorize_(model, CONFIG)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def loss_of(model: nn.Module, number: int) -> Tensor:
    """Of this process's own sequences."""
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    ids = torch.randint(256, (2, 17), generator=generator)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@contextlib.contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Within, the processes do not exchange gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, passes: int = 1, is_apart: bool = False) -> bool:
    """Trains; returns whether every gradient was gone before each ``step()``."""
    gone = True
    for step in range(STEPS):
        for number in range(passes):
            is_last = number == passes - 1
            with apart(model) if is_apart and not is_last else contextlib.nullcontext():
                (loss_of(model, step * passes + number) / passes).backward()
        gone = gone and all(each.grad is None for each in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return gone


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, torch.distributed.tensor.DTensor) else value


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((local(a) - local(b)).detach().abs().max()) if local(a).numel() else 0.0 for a, b in pairs)


def beside_plain(wrap: Callable[[nn.Module], nn.Module], accumulate: int = 1, **kwargs: Any) -> dict[str, Any]:
    """The greatest difference of a parameter after training with plain and with per-layer updates; gradients gone."""
    adamw = partial(torch.optim.AdamW, lr=3e-3)
    plain, ours = wrap(model_of()), wrap(model_of())
    start = copy.deepcopy([local(each).detach() for each in plain.parameters()])
    train(plain, adamw(plain.parameters()), **kwargs)
    gone = train(ours, per_layer(adamw.func, ours.parameters(), accumulate=accumulate, **adamw.keywords), **kwargs)
    moved = sum(not torch.equal(a, local(b)) for a, b in zip(start, ours.parameters(), strict=True))
    return {"difference": difference(plain, ours), "gone": gone, "all moved": moved == len(start)}


def equal(folder: Path) -> dict[str, dict[str, Any]]:
    """Each way to combine gradients, beside plain updates."""
    wraps = {"ddp": DDP, "ddp views": partial(DDP, gradient_as_bucket_view=True), "fsdp": sharded}
    found = {}
    for name, wrap in wraps.items():
        found[name] = beside_plain(wrap)
        found[f"{name}, accumulating"] = beside_plain(wrap, passes=PASSES, accumulate=PASSES)
        found[f"{name}, accumulating apart"] = beside_plain(wrap, passes=PASSES, is_apart=True)
    return found


def orders(folder: Path) -> dict[str, Any]:
    """DDP after the optimizer; two optimizers; what is refused."""
    reference = DDP(model_of())
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1))

    late = model_of()
    optimizer = per_layer(torch.optim.SGD, late.parameters(), lr=0.1)
    late = DDP(late)
    gone = train(late, optimizer)
    found: dict[str, Any] = {"late": difference(reference, late), "gone": gone}

    shared = DDP(model_of())
    parameters = list(shared.parameters())
    halves = [per_layer(torch.optim.SGD, half, lr=0.1) for half in (parameters[::2], parameters[1::2])]
    for step in range(STEPS):
        loss_of(shared, step).backward()
        for half in halves:
            half.step()
    found["two optimizers"] = difference(reference, shared)

    partly = DDP(model_of())  # the other half is updated as ever
    parameters = list(partly.parameters())
    mixed = [per_layer(torch.optim.SGD, parameters[::2], lr=0.1), torch.optim.SGD(parameters[1::2], lr=0.1)]
    for step in range(STEPS):
        loss_of(partly, step).backward()
        for each in mixed:
            each.step()
            each.zero_grad()
    found["one per layer, one plain"] = difference(reference, partly)

    early = model_of()
    parameters = list(early.parameters())
    optimizer = per_layer(torch.optim.SGD, parameters[::2], lr=0.1)
    early = DDP(early)
    found["partial and early"] = error_of(lambda: loss_of(early, 0).backward())
    hooked = DDP(model_of())
    hooked.register_comm_hook(None, fp16_compress_hook)
    found["hooked"] = error_of(lambda: per_layer(torch.optim.SGD, hooked.parameters(), lr=0.1))
    unused = DDP(model_of(), find_unused_parameters=True)
    found["unused"] = error_of(lambda: per_layer(torch.optim.SGD, unused.parameters(), lr=0.1))
    alone = DDP(model_of())
    optimizer = per_layer(torch.optim.SGD, alone.parameters(), lr=0.1)
    with alone.no_sync():
        loss_of(alone, 0).backward()
    found["never averaged"] = error_of(optimizer.step)
    return found


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def clipped(folder: Path) -> dict[str, float]:
    """A shard's gradient is scaled by the norm of the whole one."""
    limit = 0.02
    plain, ours = (sharded(model_of()) for _ in range(2))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss_of(plain, 0).backward()
    clips = 0
    for parameter in plain.parameters():
        clips += float(nn.utils.clip_grad_norm_([parameter], limit).full_tensor()) > limit
    optimizer.step()
    train_once = per_layer(torch.optim.SGD, ours.parameters(), lr=0.1, max_grad_norm=limit)
    loss_of(ours, 0).backward()
    train_once.step()
    return {"difference": difference(plain, ours), "clips": clips, "parameters": len(list(plain.parameters()))}


def checkpoints(folder: Path) -> dict[str, Any]:
    """Sharded states, float and 8-bit, saved per layer and loaded into a new optimizer; then more steps of both."""
    from torchao.optim import AdamW8bit

    torch.compiler.set_stance("force_eager")  # torchao compiles an update for each shape
    found: dict[str, Any] = {}
    for name, cls in {"float": torch.optim.AdamW, "8-bit": AdamW8bit}.items():
        make = partial(per_layer, cls, lr=3e-3)
        model, plain = (sharded(model_of(128).float()) for _ in range(2))
        optimizer = make(model.parameters())
        train(model, optimizer)
        train(plain, cls(plain.parameters(), lr=3e-3))
        found[name] = {"difference to plain": difference(model, plain)}
        states = [value for state in optimizer.state.values() for value in state.values()]
        kinds = sorted({type(local(each)).__name__ for each in states if isinstance(each, Tensor) and each.dim()})
        ranks.example.save(model, optimizer, folder / name, STEPS)
        restored = sharded(model_of(128).float())
        second = make(restored.parameters())
        step = ranks.example.load(restored, second, folder / name)
        train(model, optimizer)
        train(restored, second)
        found[name] |= {"step": step, "kinds": kinds, "difference to restored": difference(model, restored)}
    torch.compiler.set_stance("default")
    return found


def low_bit_model(width: int = 256, groups: int = 16, seed: int = 0) -> nn.Module:
    """Halves of its factors and values are whole blocks of 256, and most of more than 4096 numbers."""
    torch.manual_seed(seed)
    model = ranks.example.Transformer(width=width, heads=2, layers=1, context=16)
    return slcompile.factorize_(model, slcompile.SLConfig(rank=32, density=groups / width, seed=0))


def low_bit_class(name: str) -> type[torch.optim.Optimizer]:
    import torchao.optim

    return getattr(torchao.optim, name)


CUT = {"AdamW8bit": (256, 11), "AdamW4bit": (192, 14)}
"""Width, and values in each row of q, k and v: whole blocks of 256 or of 128, and half a block more in each half."""


def moments(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The class of each first moment, of this process's shard, and its numbers, whole."""
    found = []
    for parameter in optimizer.param_groups[0]["params"]:
        moment = optimizer.state[parameter]["exp_avg"]
        kind = type(local(moment)).__name__
        numbers = moment.full_tensor() if isinstance(moment, torch.distributed.tensor.DTensor) else moment
        found.append((kind, numbers.dequantize() if hasattr(numbers, "dequantize") else numbers))
    return found


def low_bit(folder: Path) -> dict[str, Any]:
    """8- and 4-bit states of shards, saved per layer; and one that other processes cannot read."""
    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    for name in ("AdamW8bit", "AdamW4bit"):
        for place, shape in ((folder / name, ()), (folder / f"{name} cut", CUT[name])):
            model = sharded(low_bit_model(*shape))
            optimizer = per_layer(low_bit_class(name), model.parameters(), lr=3e-3)
            train(model, optimizer)
            ranks.example.save(model, optimizer, place, STEPS)
            kinds, numbers = zip(*moments(optimizer), strict=True)
            torch.save(numbers, place / f"moments{dist.get_rank()}.pt")
            found[place.name] = kinds
    torch.compiler.set_stance("default")
    return found


def most_gradients(folder: Path) -> dict[str, list[int]]:
    """The most gradients that are there at once, in bytes: plain and per layer, under FSDP2."""
    found = {}
    for name in ("plain", "per layer"):
        model = sharded(model_of())
        parameters = list(model.parameters())
        make: Make = torch.optim.SGD if name == "plain" else partial(per_layer, torch.optim.SGD)
        alive: list[int] = []
        for each in parameters:
            each.register_post_accumulate_grad_hook(
                lambda _, parameters=parameters, alive=alive: alive.append(
                    sum(local(p.grad).nbytes for p in parameters if p.grad is not None)
                )
            )
        optimizer = make(parameters, lr=0.1)
        loss_of(model, 0).backward()
        optimizer.step()
        found[name] = [max(alive), sum(local(each).nbytes for each in parameters)]
        gc.collect()
    return found


def updates(folder: Path) -> dict[str, Any]:
    """All of it in one process group."""
    parts = (equal, orders, clipped, checkpoints, low_bit, most_gradients)
    return dict(itertools.chain((each.__name__, each(folder)) for each in parts))


if __name__ == "__main__":
    ranks.main(globals())
