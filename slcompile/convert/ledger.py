"""What this process knows of the models that it converted: reports, owners, what was announced."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slcompile.config import COMPILED, SLConfig
from slcompile.ops.quantized import BITS
from slcompile.passes import Decision, PassReport
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import base_class

log = logging.getLogger("slcompile")

EXPLICIT = "_slcompile_config"
"""Attribute of a model on which ``factorize_`` was called: the backend then converts nothing more below it."""


@dataclass
class ModelRecord:
    """What is decided once for a whole model, however many graphs it is captured in.

    Attributes:
        begun: Whether weights of it were converted.
        auto_init: What ``init="auto"`` came to; None before it was asked.
        report: What was replaced and what was left, in all graphs so far.
    """

    begun: bool = False
    auto_init: str | None = None
    report: PassReport = field(default_factory=lambda: PassReport("weights"))


class Ledger:
    """The memory of conversions. The process has one, ``ledger``; an estimate keeps one of its own, which is silent.

    Nothing in it keeps a model or a weight alive.

    Attributes:
        lock: Is held from choosing what to convert until it is converted.
        newest: The report of the model that was converted or dry-run last, or was seen first and is left dense.
        warned: Models of which it was said that nothing was factorized.
        configs: A dense weight -> the options that it is, or was, converted with, settled for its name.
        other_reads: A dense weight -> how a graph has read it in training, other than by matmuls. Such a weight must
            stay dense in every later graph of the step, too; otherwise one step would see two copies of it.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.lock = threading.RLock()
        self._silent = silent
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.newest: PassReport | None = None
        self.warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.configs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.other_reads: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._records: weakref.WeakKeyDictionary[nn.Module, ModelRecord] = weakref.WeakKeyDictionary()
        self._dry_runs: weakref.WeakKeyDictionary[nn.Module, PassReport] = weakref.WeakKeyDictionary()
        self._converted: list[weakref.ref[nn.Parameter]] = []
        self._owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._says_how_to_compile = False  # the options of some model that was factorized explicitly

    def record(self, roots: Sequence[nn.Module]) -> ModelRecord:
        """Returns the record of the model with these roots; a new one, which is not kept, where there is none."""
        return next((self._records[root] for root in roots if root in self._records), None) or ModelRecord()

    def add(self, record: ModelRecord, roots: Sequence[nn.Module], report: PassReport) -> None:
        """Keeps a record and adds what one graph replaced and left."""
        record.report.replaced += report.replaced
        replaced = {decision.name for decision in record.report.replaced}
        left = {decision.name: decision for decision in [*record.report.left, *report.left]}
        record.report.left = [decision for name, decision in left.items() if name not in replaced]
        self._records.update(dict.fromkeys(roots, record))

    def note_left(self, roots: Sequence[nn.Module], report: PassReport) -> None:
        """Keeps what a graph without anything to convert leaves dense, for the report of its model."""
        if roots:
            record = self.record(roots)
            if not any(root in self._records for root in roots):
                self.newest = record.report
            self.add(record, roots, report)

    def names_left(self, root: nn.Module) -> set[str]:
        """Returns names of the weights that the graphs captured of a model so far leave dense."""
        return {decision.name for decision in self._records[root].report.left} if root in self._records else set()

    def note_conversion(
        self,
        record: ModelRecord,
        roots: Sequence[nn.Module],
        weights: Sequence[tuple[nn.Parameter, nn.Module]],
        init: str,
        report: PassReport,
    ) -> None:
        """Keeps what was converted and announces it; a model's first conversion as a warning: it replaces weights.

        Args:
            record: Of the model.
            roots: The model's outermost modules.
            weights: Each dense parameter that was converted, and the module that took its place.
            init: What the weights start from: ``"kaiming"``, ``"spectral"``, or the kind of base they are added to.
            report: What the graph, or the call of ``factorize_``, replaced and left.
        """
        is_first, record.begun = not record.begun, True
        self._converted += [weakref.ref(dense) for dense, _ in weights]
        self.newest = record.report
        self.add(record, roots, report)
        if self._silent:
            return
        start = {
            "kaiming": "init kaiming, which replaces the weights",
            "spectral": "init spectral, which replaces the weights by their best approximation",
        }.get(init, "which begin at zero and are added to the weights, which are frozen")
        if init in BITS:
            start += f" and held as {init}"
        trained = (each for _, weight in weights for each in weight.parameters() if each.requires_grad)
        log.log(
            logging.WARNING if is_first else logging.INFO,
            "slcompile: factorized %d weights of %s (%d left dense): %s -> %s parameters in them, %s",
            len(weights),
            _kinds(roots),
            len(record.report.left),
            f"{sum(dense.numel() for dense, _ in weights):,}",
            f"{sum(each.numel() for each in trained):,}",
            start,
        )
        log.debug("%s", record.report)

    def warn_of_unread(self, names: Sequence[str]) -> None:
        """Says which layers stay dense as no captured graph of the examples that were given reads them."""
        if names and not self._silent:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            message = "slcompile: no captured graph of the examples reads %s%s: left dense. slcompile.explain says why"
            log.warning(message, names[0], more)

    def note_dry_run(self, roots: Sequence[nn.Module], report: PassReport) -> None:
        """Reports what a conversion would do, for all graphs of a model that were captured so far; changes nothing."""
        if not roots:
            return
        known = next((self._dry_runs[root] for root in roots if root in self._dry_runs), None)
        known = known or PassReport(report.pass_name)
        _add_unknown(known.replaced, report.replaced)
        _add_unknown(known.left, report.left)
        self._dry_runs.update(dict.fromkeys(roots, known))
        self.newest = known
        log.warning("slcompile: dry run, nothing of %s is changed. %s", _kinds(roots), known)

    def forget(self, model: nn.Module) -> None:
        """Lets the next conversion of a model, or of what contains it or is part of it, be a first one again."""
        inside = set(model.modules())
        for root in list(self._records):
            if root in inside or not inside.isdisjoint(root.modules()):
                del self._records[root]

    def warn_of_held_weights(self) -> None:
        """Warns once of converted dense weights that something still holds, such as a list made before conversion."""
        if any(reference() is not None for reference in self._converted):
            gc.collect()
        held = [parameter for parameter in (reference() for reference in self._converted) if parameter is not None]
        self._converted.clear()
        if held:
            log.warning(
                "slcompile: %d converted dense weights (%s bytes) are still held by something that is no module and no "
                "optimizer, such as a list of parameters made before: they take memory, unless they are a frozen base, "
                "and clipping or averaging that list misses the factors",
                len(held),
                f"{sum(parameter.nbytes for parameter in held):,}",
            )

    def note_explicit(self, model: nn.Module, config: SLConfig) -> None:
        """Keeps, on a model that was factorized explicitly, the options of that."""
        object.__setattr__(model, EXPLICIT, config)
        default = SLConfig()
        self._says_how_to_compile |= any(getattr(config, name) != getattr(default, name) for name in COMPILED)

    def explicit_options(self, inputs: Iterable[Any]) -> dict[str, Any]:
        """Returns what ``factorize_`` was told of how to compile the model whose parameters are among these inputs."""
        if not self._says_how_to_compile:
            return {}
        live = LiveObjects.find()
        pairs = live.owners(each for each in inputs if isinstance(each, nn.Parameter)).values()
        owners = {id(module): module for owners in pairs for module, _ in owners}
        above = (each for module in owners.values() for each in live.ancestors(module))
        config = next((vars(each)[EXPLICIT] for each in above if EXPLICIT in vars(each)), None)
        return {} if config is None else {name: getattr(config, name) for name in COMPILED}

    def remember_owners(self, parameter: Tensor, owners: Iterable[tuple[nn.Module, str]]) -> None:
        """Keeps who owns a parameter for ``in_training``, which would otherwise walk over all objects each time."""
        self._owners[parameter] = [(weakref.ref(module), name) for module, name in owners]

    def in_training(self, parameter: Tensor) -> bool:
        """Says whether a parameter's owners are all in training; runs at every call of a graph."""
        alive = self._alive_owners(parameter)
        if not alive:
            self.remember_owners(parameter, LiveObjects.find().owners([parameter])[id(parameter)])
            alive = self._alive_owners(parameter)
        return bool(alive) and all(module.training for module in alive)

    def _alive_owners(self, parameter: Tensor) -> list[nn.Module]:
        """Returns the owners found before; none where one of them is gone or owns it no more."""
        found = [(reference(), name) for reference, name in self._owners.get(parameter, ())]
        modules = [module for module, name in found if module is not None and module._parameters.get(name) is parameter]
        return modules if len(modules) == len(found) else []


def _add_unknown(known: list[Decision], new: Iterable[Decision]) -> None:
    names = {decision.name for decision in known}
    known += [decision for decision in new if decision.name not in names]


def _kinds(roots: Sequence[nn.Module]) -> str:
    return ", ".join(sorted({base_class(root).__name__ for root in roots}))


ledger = Ledger()
"""The process's own."""


def last_report() -> PassReport | None:
    """Returns what was replaced of the newest model that training captured, and what was left and why; None before."""
    return ledger.newest
