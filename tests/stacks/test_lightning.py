"""Lightning: ``trainer.fit(torch.compile(module, backend="sltrain"))``."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import slcompile

pytestmark = pytest.mark.slow


@pytest.fixture
def classifier(block_class) -> type[lightning.LightningModule]:
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = block_class()
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.block(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.block(batch[0]), batch[1])

        # Not in training_step: Dynamo cannot trace Lightning's log (torch 2.13, with any backend).
        def on_train_batch_end(self, outputs, batch, index) -> None:
            self.log("train_loss", outputs["loss"])
            self.losses.append(outputs["loss"].item())

        def on_validation_batch_end(self, outputs, batch, index) -> None:
            self.log("val_loss", outputs)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Classifier


def fit(module, batch, folder: Path, epochs: int, resume: Path | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(*batch), batch_size=16)
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def test_fit_converts_trains_checkpoints_and_resumes(tmp_path, classifier, batch, light):
    module = classifier()
    trainer = fit(torch.compile(module, backend="sltrain", options=light), batch, tmp_path / "run", epochs=4)
    factors = slcompile.factors(module)
    assert sorted(factors) == ["block.down.weight", "block.mix", "block.up.weight"]
    assert len(module.losses) == 8
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    (optimizer,) = trainer.optimizers
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(
        map(id, module.parameters())
    )

    half = fit(torch.compile(started := classifier(), backend="sltrain", options=light), batch, tmp_path / "half", 2)
    assert len(started.losses) == 4
    saved = half.checkpoint_callback.best_model_path
    config = slcompile.SLConfig.from_options(light)[0]
    resumed = classifier()
    slcompile.factorize_(resumed.block, config, example_args=batch[:1])
    fit(torch.compile(resumed, backend="sltrain", options=light), batch, tmp_path / "again", epochs=4, resume=saved)
    assert started.losses + resumed.losses == module.losses
    with pytest.raises(RuntimeError, match=r"holds the factors of block\.mix and 2 more, dense in this Classifier"):
        fit(torch.compile(classifier(), backend="sltrain"), batch, tmp_path / "dense", epochs=4, resume=saved)
