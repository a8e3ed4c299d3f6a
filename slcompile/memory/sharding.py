"""A training step's allocations and messages on one of many GPUs: under FSDP2, DDP and tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from slcompile.config import require_int
from slcompile.passes.liveness import START, Event, layer_in

GATHERED, REDUCING = "gathered parameters", "reduction buffers"

GATHER, SCATTER, ALL, TENSOR, FACTORS = (
    "all-gather of FSDP2",
    "reduce-scatter of FSDP2",
    "all-reduce of DDP",
    "all-reduce of tensor parallelism",
    "all-reduce of whole factors' gradients",
)
"""What is sent: parameters, their gradients, these under DDP, activations and their gradients, and under tensor
parallelism the gradients of the factors that each process has whole: A of a column-parallel weight, B of a row-parallel
one."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread.

    Attributes:
        gpus: All of them.
        fsdp: Whether parameters are sharded among the processes that see different data, by ``fully_shard`` on each
            layer and on the model; otherwise each has all of them, and DDP averages the gradients.
        tp: Processes that share a layer's matmuls and see the same data.

    Raises:
        ValueError: ``tp`` does not divide ``gpus``, or one of them is no int above 0.
    """

    gpus: int
    fsdp: bool = True
    tp: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "tp"):
            require_int(name, getattr(self, name))
        if self.gpus % self.tp:
            raise ValueError(f"tp must divide gpus={self.gpus}, got {self.tp}")

    @property
    def data(self) -> int:
        """Processes that see different data."""
        return self.gpus // self.tp

    @property
    def shards(self) -> bool:
        """Whether parameters are cut in shards."""
        return self.fsdp and self.data > 1

    def __str__(self) -> str:
        way = "" if self.data == 1 else " (FSDP2)" if self.fsdp else " (DDP)"
        return f"{self.gpus} GPUs: {self.data} with data of their own{way} x {self.tp} that share each matmul"


def layer_of(name: str) -> int | None:
    """Returns the layer in which a parameter of this name is; None outside of the layers."""
    return layer_in("." + name.rpartition(".")[0])


def cut_dimension(parameter: Tensor, world: int) -> int:
    """Returns the dimension that is cut: the first one, as FSDP2 does by default.

    Of a stack of fewer matrices than processes that is the second one, if they can divide it: ``fully_shard`` needs a
    ``shard_placement_fn`` for that.
    """
    is_short = parameter.dim() == 3 and parameter.shape[0] < world
    return 1 if is_short and parameter.shape[1] % world == 0 else 0


def shard_elements(parameter: Tensor, world: int) -> int:
    """Returns the elements of a shard of FSDP2, which cuts a dimension and pads the last shards."""
    if parameter.dim() == 0 or world == 1:
        return parameter.numel()
    length = parameter.shape[cut_dimension(parameter, world)]
    return math.ceil(length / world) * (parameter.numel() // length)


def trained_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns those that have gradients."""
    return {name: each for name, each in parameters.items() if each.requires_grad}


def shards(parameters: Mapping[str, nn.Parameter], world: int) -> dict[int | None, int]:
    """Returns bytes of the shards of each layer, and of what is outside of the layers (None)."""
    found: dict[int | None, int] = {None: 0}
    for name, each in parameters.items():
        layer = layer_of(name)
        found[layer] = found.get(layer, 0) + shard_elements(each, world) * each.itemsize
    return found


@dataclass
class _Sharded:
    """Turns the events of a step with whole parameters into those with sharded ones, in FSDP2's order.

    A layer's parameters are gathered before its forward and before its backward pass, in a buffer of all shards from
    which they are copied out, those that are cut in the second dimension twice. Forward, the buffer is freed when the
    next layer's was filled; backward, at once, when the next layer's is allocated. After its backward pass the
    gradients are copied to a buffer that is reduced to a shard; it is freed before the next layer's is made. gloo
    copies what it sends for as long as that takes. What is outside of the layers stays gathered from the first layer to
    the end.
    """

    shards: Mapping[int | None, int]
    reduced: Mapping[int | None, int]
    twice: Mapping[int | None, int]
    world: int
    scratch: Mapping[int | None, Sequence[int]]
    per_layer: bool
    together: bool
    gloo: bool
    gathering: int = 0  # bytes of the buffers that are there now
    reducing: int = 0
    gradients: int = 0  # bytes of whole gradients that wait for their reduction

    def whole(self, layer: int | None) -> int:
        """Returns the bytes of a layer's gathered parameters; some layers have none."""
        return self.world * self.shards.get(layer, 0)

    def events(self, given: Sequence[Event]) -> Iterator[Event]:
        """Yields the events of the step."""
        last = max((each for each in self.shards if each is not None), default=None)
        place, layer = "", None
        for event in given:
            if event.place == "optimizer step":
                continue
            if event.place != START and (event.place, event.layer) != (place, layer):
                yield from self._leave(place, layer)
                if event.place.startswith("backward") and not place.startswith("backward"):
                    yield self._event(event, GATHERED, -self.gathering)
                    self.gathering = 0 if last is None else self.whole(last)  # of which the backward pass begins with
                    yield self._event(event, GATHERED, self.gathering)
                    yield from self._message(event, self.gathering)
                elif not place:
                    yield from self._gather(event, None)
                    yield from self._copy_out(event, None)
                yield from self._enter(event)
                place, layer = event.place, event.layer
            if event.part == "gradients":
                self.gradients += event.size
            yield event
        yield from self._leave(place, layer)
        end = Event("backward before the layers", None, GATHERED, -self.whole(None))
        yield end
        yield from self._reduce(end, None)
        yield self._event(end, REDUCING, -self.reducing)
        yield from self._optimize()

    def _event(self, where: Event, part: str, size: int) -> Event:
        return replace(where, part=part, size=size, of_values=False)

    def _gather(self, where: Event, layer: int | None) -> Iterator[Event]:
        """Allocates a buffer for a layer's shards, and frees the one before."""
        yield self._event(where, GATHERED, self.whole(layer))
        yield from self._message(where, self.whole(layer))
        yield self._event(where, GATHERED, -self.gathering)
        self.gathering = self.whole(layer)

    def _copy_out(self, where: Event, layer: int | None) -> Iterator[Event]:
        """Allocates a layer's parameters, and for a moment the copies of those that are cut in the second dimension."""
        yield self._event(where, GATHERED, self.whole(layer))
        for each in (self.world * self.twice.get(layer, 0), -self.world * self.twice.get(layer, 0)):
            yield self._event(where, "temporaries", each)

    def _message(self, where: Event, size: int) -> Iterator[Event]:
        for each in (size, -size) if self.gloo else ():
            yield self._event(where, "temporaries", each)

    def _enter(self, event: Event) -> Iterator[Event]:
        if event.layer is None:
            return
        if event.place == "forward":
            yield from self._gather(event, event.layer)
            yield from self._copy_out(event, event.layer)
        elif event.place == "backward":
            yield from self._copy_out(event, event.layer)
            yield self._event(event, GATHERED, -self.gathering)
            self.gathering = self.whole(event.layer - 1)
            yield self._event(event, GATHERED, self.gathering)
            yield from self._message(event, self.gathering)

    def _leave(self, place: str, layer: int | None) -> Iterator[Event]:
        if layer is None or place not in ("forward", "backward"):
            return
        where = Event(place, layer, GATHERED, -self.whole(layer))
        yield where
        if place == "backward":
            yield from self._reduce(where, layer)

    def _reduce(self, where: Event, layer: int | None) -> Iterator[Event]:
        yield self._event(where, REDUCING, -self.reducing)
        self.reducing = self.world * self.reduced.get(layer, 0)
        yield self._event(where, REDUCING, self.reducing)
        yield self._event(where, "gradients", -self.gradients)
        self.gradients = 0
        yield self._event(where, "gradients", self.reduced.get(layer, 0))
        yield from self._message(where, self.reducing)
        if self.per_layer:
            yield from self._update(where, layer)

    def _optimize(self) -> Iterator[Event]:
        if not self.per_layer:
            where = Event("optimizer step", None, "temporaries", 0)
            if self.together:
                sizes = sum(size for layer in self.shards for size in self.scratch[layer])
                yield self._event(where, "temporaries", sizes)
                yield self._event(where, "temporaries", -sizes)
            for layer in self.shards:
                yield from self._update(where, layer)

    def _update(self, where: Event, layer: int | None) -> Iterator[Event]:
        for size in () if self.together else self.scratch.get(layer, ()):
            yield self._event(where, "temporaries", size)
            yield self._event(where, "temporaries", -size)
        yield self._event(where, "gradients", -self.reduced.get(layer, 0))


def sharded_events(
    events: Sequence[Event], parameters: Mapping[str, nn.Parameter], world: int,
    scratch: Callable[[int, int], int], *, per_layer: bool, together: bool, gloo: bool,
) -> list[Event]:  # fmt: skip
    """Returns the events of a step with parameters sharded by FSDP2, from those of one with whole parameters.

    Args:
        events: Of a step that keeps each gradient until the optimizer's.
        parameters: By name; all of them are gathered, and gradients of trained ones reduced.
        world: Processes among which they are sharded.
        scratch: Bytes that the optimizer's step allocates for one parameter, by its elements and bytes an element.
        per_layer: Whether each shard is updated after its reduction.
        together: Whether the optimizer's step holds what it allocates for all parameters at once.
        gloo: Whether messages are gloo's, as on the CPU.
    """
    sizes = shards(parameters, world)
    scratches: dict[int | None, list[int]] = {layer: [] for layer in sizes}
    for name, each in trained_of(parameters).items():
        scratches[layer_of(name)].append(scratch(shard_elements(each, world), each.itemsize))
    twice = {name: each for name, each in parameters.items() if cut_dimension(each, world) == 1}
    sharded = _Sharded(
        sizes,
        shards(trained_of(parameters), world),
        shards(twice, world),
        world,
        scratches,
        per_layer,
        together and not per_layer,
        gloo,
    )
    return [each for each in sharded.events(events) if each.size]


def sent(
    parameters: Mapping[str, nn.Parameter], layout: Layout, partial: Mapping[str, nn.Parameter], activations: int
) -> dict[str, int]:
    """Returns the bytes that one GPU sends in a step, by what they are for.

    Collectives are counted as rings, which send the least: of n bytes, an all-gather and a reduce-scatter among p
    send n * (p - 1) / p each, an all-reduce twice that.

    Args:
        parameters: Of one tensor-parallel process.
        layout: How they are spread.
        partial: Those that each tensor-parallel process has whole, with a part of the gradient.
        activations: Bytes that are all-reduced among the tensor-parallel processes.
    """
    data, found = layout.data, dict.fromkeys((GATHER, SCATTER, ALL, TENSOR, FACTORS), 0)
    if layout.fsdp:
        for layer, size in shards(parameters, data).items():
            found[GATHER] += (data - 1) * size * (1 if layer is None else 2)  # layers: forward and backward
        found[SCATTER] = (data - 1) * sum(shards(trained_of(parameters), data).values())
    else:
        found[ALL] = 2 * (data - 1) * sum(each.nbytes for each in trained_of(parameters).values()) // data
    tp = layout.tp
    found[TENSOR] = 2 * (tp - 1) * activations // tp
    # Each exchanges the gradient that it holds after its backward pass: under FSDP2, before its reduction.
    found[FACTORS] = 2 * (tp - 1) * sum(each.nbytes for each in trained_of(partial).values()) // tp
    return {name: size for name, size in found.items() if size}
