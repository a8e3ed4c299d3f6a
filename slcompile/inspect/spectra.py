"""What training made of factorized weights: singular values of ``s * B @ A``, of ``S`` and of ``W``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slcompile.factorize import factors
from slcompile.files import beside, move_into_place, plot_file
from slcompile.ops.support import flat_positions
from slcompile.weight.sl_weight import Factors


@dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of one factorized weight and of its parts, descending, float32 on the CPU.

    Of a stack of matrices they have its leading sizes: [experts, ...].

    Args:
        low_rank: Of ``s * B @ A``, [..., min(rank, rows, columns)].
        sparse: Of ``S``, [..., min(rows, columns)].
        weight: Of ``W = s * B @ A + S``, [..., min(rows, columns)]; with a frozen base of that and the rest.
    """

    low_rank: Tensor
    sparse: Tensor
    weight: Tensor

    @property
    def effective_ranks(self) -> dict[str, float]:
        """The effective rank of each part, the mean over a stack: ``effective_rank`` of its singular values."""
        return {name: float(effective_rank(values).mean()) for name, values in vars(self).items()}

    def __str__(self) -> str:
        ranks = self.effective_ranks
        parts = {"s B A": "low_rank", "S": "sparse", "W": "weight"}
        return ", ".join(
            f"{label}: norm {float(getattr(self, name).max()):.3g}, effective rank {ranks[name]:.1f} of "
            f"{getattr(self, name).shape[-1]}"
            for label, name in parts.items()
        )


def effective_rank(singular_values: Tensor) -> Tensor:
    """Computes the exponential of the entropy of normalized singular values (Roy and Vetterli, 2007); 0 for zeros.

    Args:
        singular_values: [..., count], not negative.

    Returns:
        [...], between 1 and count: 1 for one direction, count for equal ones.
    """
    total = singular_values.sum(-1, keepdim=True)
    shares = singular_values / total.clamp_min(torch.finfo(singular_values.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, Spectra]:
    """Computes the singular values of every factorized weight of a model.

    They are computed in float32 on the factors' device, one weight after another. The low-rank part is never composed:
    its singular values are those of the [rank, rank] core between the QR decompositions of its factors. Those of S and
    W take time in proportion to ``rows * columns * min(rows, columns)`` and the memory of two dense weights.

    Args:
        model: Factorized by ``backend="sltrain"`` or ``factorize_``; torch.compile's wrapper may be around it.

    Returns:
        Name of each factorized weight, as it was when dense -> its spectra.

    Raises:
        ValueError: The model has no factorized weight, or one of another structure, or with NaN or Inf.
        RuntimeError: A seed buffer was overwritten, or the factors are sharded.
    """
    found = {}
    for name, parts in factors(model).items():
        if not isinstance(parts, Factors):
            raise ValueError(f"{name} has no parts B, A and S: spectra are of structure='sparse_low_rank'")
        if type(parts.B) is not Tensor:
            raise RuntimeError(f"the factors of {name} are sharded among processes: get a full state dict first")
        if not all(bool(each.isfinite().all()) for each in (parts.B, parts.A, parts.values)):
            raise ValueError(f"the factors of {name} contain NaN or Inf, of which there are no singular values")
        found[name] = _of(parts)
    if not found:
        raise ValueError(f"model must have factorized weights, got {type(model).__name__} without one")
    return found


def _of(parts: Factors) -> Spectra:
    B, A, values = parts.B.float(), parts.A.float(), parts.values.float()
    support = parts.index if parts.index is not None else torch.tensor([parts.seed], device=B.device)
    S = B.new_zeros(*B.shape[:-1], A.shape[-1])
    S.view(-1)[flat_positions(values, support, A.shape[-1], parts.vector).long()] = values.flatten()
    whole = S.clone() if parts.base is None else S + parts.base.float()
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    return Spectra(
        low_rank=(parts.scale * torch.linalg.svdvals(core)).cpu(),
        sparse=torch.linalg.svdvals(S).cpu(),
        weight=torch.linalg.svdvals(whole.add_(B @ A, alpha=parts.scale)).cpu(),
    )


def plot_spectra(spectra: Mapping[str, Spectra], path: str | os.PathLike[str]) -> Path:
    """Draws the singular values of each weight, a panel for ``s B A``, ``S`` and ``W``; returns the file.

    Args:
        spectra: What ``slcompile.spectra`` returns; not empty. Of a stack of matrices the mean is drawn.
        path: A .png or .svg.

    Raises:
        ValueError: There are no spectra; or as ``plot_file``.
        ImportError: As ``plot_file``.
    """
    if not spectra:
        raise ValueError(f"spectra must hold those of a weight, got {spectra!r}")
    target = plot_file(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (part, title) in zip(panels, (("low_rank", "s B A"), ("sparse", "S"), ("weight", "W")), strict=True):
        for name, each in spectra.items():
            values = getattr(each, part)
            values = values.reshape(-1, values.shape[-1]).mean(0)
            axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
        mean = sum(each.effective_ranks[part] for each in spectra.values()) / len(spectra)
        axes.set(title=f"{title}: effective rank {mean:.1f} on average", xlabel="singular value, by size")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("size")
    if len(spectra) <= 30:
        panels[2].legend(frameon=False, fontsize="xx-small", loc="center left", bbox_to_anchor=(1, 0.5))
    with beside(target) as scratch:
        figure.savefig(scratch / target.name, dpi=150)
        move_into_place(scratch, target.parent, last=target.name)
    return target
