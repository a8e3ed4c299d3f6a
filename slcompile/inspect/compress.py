"""``compress``: a trained model's weights as factors that change the model's outputs for given inputs least."""

from __future__ import annotations

import glob
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.config import SLConfig, checked_config, require_int, require_number
from slcompile.convert.candidates import Candidate
from slcompile.convert.drift import Drift, drifts
from slcompile.convert.ledger import ledger
from slcompile.convert.moments import Moments, call, floating_leaves, use_moments
from slcompile.convert.weight_uses import captured_uses, unread_layers
from slcompile.factorize import factorize_uses, named_weights
from slcompile.inspect.suggest import SuggestedRank, distribute, eligible, require_possible, table
from slcompile.models import arguments_for, buffers_restored, in_eval, layers_as_in_training, unwrapped
from slcompile.weight.fit import loss, spectrum
from slcompile.weight.sl_weight import SLWeight
from slcompile.weight.structure import structure_of

log = logging.getLogger("slcompile")

SUPPORT = "largest"
"""What ``compress`` takes unless a config says otherwise."""
Fits = dict[str, tuple[SLWeight, SuggestedRank]]
"""The factors of each weight by its name, and what it got."""


@dataclass(frozen=True)
class Compression:
    """What ``compress`` did.

    Attributes:
        weights: By fully qualified name, in the model's order. ``error`` is the relative error of what the weight
            computes on the calibration inputs, before distillation.
        by_outputs: Whether the weights were weighed by what they do to the model's outputs. False where to some no
            gradient came: then by what each weight computes, relative to that.
        refined: Relative squared error of the model's outputs on the calibration batches, before ``refine`` and after
            it; None without.
        distilled: Relative squared error of the model's outputs on the first and on the last batch of the
            distillation; None without one.
    """

    weights: Mapping[str, SuggestedRank]
    by_outputs: bool
    refined: tuple[float, float] | None = None
    distilled: tuple[float, float] | None = None

    @property
    def share(self) -> float:
        """The share of the weights' parameters that is left."""
        dense = sum(math.prod(each.shape) for each in self.weights.values())
        return sum(each.parameters for each in self.weights.values()) / dense

    def __str__(self) -> str:
        lines = [table(self.weights), f"{self.share:.1%} of the parameters of {len(self.weights)} weights are left"]
        if not self.by_outputs:
            lines.append("no gradient of the outputs came to some weights: each counted by what it computes itself")
        if self.refined is not None:
            lines.append("squared error of the outputs {:.4f}, refined to {:.4f}".format(*self.refined))
        if self.distilled is not None:
            lines.append("squared error of the outputs {:.4f}, distilled to {:.4f}".format(*self.distilled))
        return "\n".join(lines)


@torch.inference_mode(False)
def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    budget: float | None = None,
    rank: int | float | Mapping[str, int | float] | None = None,
    density: float | Mapping[str, float] | None = None,
    config: SLConfig | None = None,
    refine: bool = False,
    distill_steps: int = 0,
    lr: float = 3e-4,
) -> Compression:
    """Compresses a trained model in place: each weight becomes the ``B A + S`` that changes the outputs least.

    The model runs on the calibration batches, forward and backward, and the inputs of each weight and the gradients of
    what it computes are watched. ``B A`` is the truncated SVD that is best for them, ``S`` has its non-zeros where that
    is worst, and the two are fitted in turns. With a budget, rank goes where a next direction does most to the outputs.

    Args:
        model: With weights that were trained; it runs in ``eval`` mode, outside an autocast around. ``merge_``,
            ``save_merged``, ``save_factorized`` and ``export_onnx`` take it afterwards.
        calibration: Batches, of a kind with what the model is to serve: each a mapping of keyword arguments, a tuple
            of positional ones, or one value. A few thousand tokens or more; all batches are held.
        budget: The share of the weights' parameters that factors and values may take, in (0, 1); with it, ``rank`` is
            distributed.
        rank, density: As in ``SLConfig``.
        config: The other options; by default ``SLConfig(support="largest")``.
        refine: Fit weights once more, in the order of their use: each gets inputs that approximated weights before it
            made, and is fitted to give for those what the dense one gives for its own, where that lowers the squared
            error of the model's outputs: for a model that is not trained on. Takes a forward pass of both models over
            all batches for each set of weights with the same inputs. Weights of convolutions are left, and those that
            get another number of inputs then.
        distill_steps: Steps of AdamW on the factors, each on a calibration batch, toward the dense model's outputs,
            which are held.
        lr: Its learning rate.

    Returns:
        What each weight got, and what it lost.

    Raises:
        ValueError: An argument is not allowed, the budget cannot be met, or a weight is multiplied with no calibration
            input; the model is then as it was. Or as ``factorize_``.
        RuntimeError: The distillation diverged; the model has the factors from before it.
    """
    model = unwrapped(model)
    config = _options(budget, rank, density, config)
    if type(refine) is not bool:
        raise ValueError(f"refine must be True or False, got {refine!r}")
    require_int("distill_steps", distill_steps, least=0)
    require_number("lr", lr)
    if isinstance(calibration, Mapping):
        raise ValueError("calibration must be batches, got a mapping, which is one: put it into a list")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration must have a batch, got none")
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    autocast = torch.autocast(device.type, enabled=False)  # what is fitted is of float32; a model may have its own
    with in_eval(model), buffers_restored(model), layers_as_in_training(), torch.random.fork_rng(), autocast:
        captured = captured_uses(model, (_arguments(arguments_for(model, batch)) for batch in batches))
        chosen = eligible(model, config, captured)
        ledger.warn_of_unread(unread_layers(model, config, captured))
        if budget is not None:
            require_possible(budget, chosen)
        uses = use_moments(model, [(each.weight, each.input_dim) for each in chosen], batches)
        _require_reached(chosen, uses)
        by_outputs = all(known.gradients is not None and bool(known.gradients.any()) for known in uses.values())
        if not by_outputs:
            for known in uses.values():
                known.gradients = None
        targets = _targets(model, batches) if distill_steps else []
        if distill_steps:
            _require_gradients(model, batches[0])
        options = {each.name: each.config for each in chosen}
        if budget is not None:
            energies = {each.name: _energies(each, uses[id(each.weight)]) for each in chosen}
            ranks = distribute(budget, chosen, energies)
            options = {name: replace(own, rank=ranks[name]) for name, own in options.items()}
            config = replace(config, rank={glob.escape(name): rank for name, rank in ranks.items()})
        fits = {each.name: _fitted(each, options[each.name], uses[id(each.weight)]) for each in chosen}
        refined = None
        if refine:
            fits, refined = _refined(model, batches, chosen, options, uses, fits)
        made = {id(each.weight): fits[each.name][0] for each in chosen}
        factorize_uses(model, config, captured, ledger, made)
        distilled = _distill(model, batches, targets, distill_steps, lr) if distill_steps else None
    return Compression({name: found for name, (_, found) in fits.items()}, by_outputs, refined, distilled)


def _options(
    budget: float | None,
    rank: int | float | Mapping[str, int | float] | None,
    density: float | Mapping[str, float] | None,
    config: SLConfig | None,
) -> SLConfig:
    if (budget is None) == (rank is None):
        raise ValueError(f"give either budget or rank, got budget={budget!r} and rank={rank!r}")
    config = SLConfig(support=SUPPORT) if config is None else checked_config(config)
    if config.base is not None or config.init == "kaiming" or structure_of(config) is not SLWeight:
        raise ValueError(
            f"compress approximates weights as structure='sparse_low_rank', got structure={config.structure!r}, "
            f"base={config.base!r}, init={config.init!r}"
        )
    given: dict[str, Any] = {} if density is None else {"density": density}
    return replace(config, rank=1 if rank is None else rank, init="spectral", **given)


def _arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Returns a batch as the arguments of a call, by position and by name."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, (tuple, list)) else (batch,)), {}


def _require_reached(chosen: Sequence[Candidate], uses: Mapping[int, Moments]) -> None:
    missing = [each.name for each in chosen if id(each.weight) not in uses]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"calibration reaches no matmul of {missing[0]}{more}: give batches that do, or leave it out with exclude"
        )
    for each in chosen:
        known = uses[id(each.weight)]
        if not all(bool(moment.isfinite().all()) for moment in (known.inputs, known.gradients) if moment is not None):
            raise ValueError(f"calibration gives {each.name} inputs or gradients with NaN or Inf")


def _energies(candidate: Candidate, known: Moments) -> Tensor:
    """Returns what the outputs lose without each direction of a weight; without gradients, what the weight loses."""
    found = spectrum(candidate.matrix, known.inputs, known.gradients, candidate.input_dim)
    # The moments are sums over the same tokens, and so is what is lost; of a stack, over those of a matrix.
    matrices = candidate.shape[0] if len(candidate.shape) > 2 else 1
    return (found * matrices / known.tokens if known.gradients is not None else found / found.sum()).cpu()


def _refined(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Candidate],
    options: Mapping[str, SLConfig],
    uses: Mapping[int, Moments],
    fits: Fits,
) -> tuple[Fits, tuple[float, float]]:
    """Fits weights again, each behind the approximations that there are; returns the outputs' errors before and after.

    The first fits are returned where these do not lower the error.
    """
    refined = dict(fits)
    approximations = {each.weight: fits[each.name][0].merged_wide() for each in chosen}
    errors = []
    for together in _in_order_of_use(chosen, uses):
        watched = [(each.weight, each.input_dim) for each in together]
        found, error = drifts(model, watched, approximations, batches)
        errors.append(error)
        for each in together:
            if id(each.weight) in found:
                known, drift = uses[id(each.weight)], found[id(each.weight)]
                refined[each.name] = _fitted(each, options[each.name], known, drift)
                approximations[each.weight] = refined[each.name][0].merged_wide()
    before, (_, after) = errors[0], drifts(model, [], approximations, batches)
    return (refined, (before, after)) if after < before else (fits, (before, before))


def _in_order_of_use(chosen: Iterable[Candidate], uses: Mapping[int, Moments]) -> list[list[Candidate]]:
    """Returns the weights in the order in which the model uses them; those that follow with equal inputs together."""
    order = {key: place for place, key in enumerate(uses)}
    together: list[list[Candidate]] = []
    inputs = None
    for each in sorted(chosen, key=lambda each: order[id(each.weight)]):
        own = uses[id(each.weight)].inputs
        if inputs is None or not torch.equal(inputs, own):
            together.append([])
        together[-1].append(each)
        inputs = own
    return together


@torch.no_grad()
def _fitted(
    candidate: Candidate, config: SLConfig, known: Moments, drift: Drift | None = None
) -> tuple[SLWeight, SuggestedRank]:
    """Makes the factors of a weight; says what it got, and the relative error of what it computes for dense inputs."""
    dense = candidate.matrix
    weight = SLWeight(
        dense.shape, config, name=candidate.name, input_dim=candidate.input_dim, device=dense.device, dtype=dense.dtype
    )
    if dense.any():
        target = dense if drift is None else drift.corrected(dense, candidate.input_dim)
        weight.fit(target, known.inputs if drift is None else drift.inputs, known.gradients)
    else:
        weight.start_at_zero()
    lost, whole = (
        loss(each, known.inputs, None, candidate.input_dim) for each in (weight.merged_wide() - dense, dense)
    )
    weight.stored_as(candidate.weight.shape)
    error = (lost / whole).sqrt() if whole else lost  # a weight that is zero, or gets inputs of zero, loses nothing
    size = sum(part.numel() for kind in ("factors", "values") for part in weight.parts()[kind])
    return weight, SuggestedRank(weight.stored_shape, weight.rank, size, float(error))


def _targets(model: nn.Module, batches: Sequence[Any]) -> list[list[Tensor]]:
    """Returns what a model gives for each batch; ValueError where that is nothing to compare with."""
    with torch.no_grad():
        targets = [_outputs(model, batch) for batch in batches]
    if not all(targets):
        raise ValueError("distill_steps needs a model that returns floating-point tensors, got none for a batch")
    return targets


@torch.enable_grad()
def _require_gradients(model: nn.Module, batch: Any) -> None:
    if not any(each.requires_grad for each in _outputs(model, batch)):
        raise ValueError("distill_steps needs a model that runs with gradients, got one whose outputs have none")


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return floating_leaves(call(model, arguments_for(model, batch)))


def _distill(
    model: nn.Module, batches: Sequence[Any], targets: Sequence[Sequence[Tensor]], steps: int, lr: float
) -> tuple[float, float]:
    """Trains the factors toward the targets; returns the first loss and the last.

    Raises:
        RuntimeError: A loss is no number; the factors are as they were.
    """
    held = dict.fromkeys(part for _, weight in named_weights(model) for part in weight.parameters())
    parts = [part for part in held if part.requires_grad]
    before = [part.detach().clone() for part in parts]
    # Half precision rounds small steps away, and AdamW's eps to zero.
    wide = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    optimizer = torch.optim.AdamW(wide, lr, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses = []
    for step in range(steps):
        with torch.enable_grad():
            loss = _distance(_outputs(model, batches[step % len(batches)]), targets[step % len(batches)])
            # A mean over many outputs has gradients that float16 does not hold; by a power of two nothing is rounded.
            size = 2.0 ** round(math.log2(sum(each.numel() for each in targets[step % len(batches)])))
            gradients = torch.autograd.grad(loss * size, parts, allow_unused=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            with torch.no_grad():
                for part, value in zip(parts, before, strict=True):
                    part.copy_(value)
            raise RuntimeError(f"the distillation's loss is {losses[-1]} in step {step + 1}: take a lower lr than {lr}")
        for each, gradient in zip(wide, gradients, strict=True):
            each.grad = None if gradient is None else gradient.to(each.dtype) / size
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for part, each in zip(parts, wide, strict=True):
                part.copy_(each)
    return losses[0], losses[-1]


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Returns the relative squared error, the mean of the tensors; masks of infinities count nothing."""
    errors = []
    for output, target in zip(outputs, targets, strict=True):
        counts = target.isfinite()
        wanted = torch.where(counts, target, 0).float()
        given = torch.where(counts, output, 0).float()
        errors.append((given - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12))
    return torch.stack(errors).mean()
