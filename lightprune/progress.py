"""`PruningProgressBar`: the phase of the run and the numbers that matter in it, in Lightning's own bar."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from lightprune.pipeline import Pipeline


class PruningProgressBar(TQDMProgressBar):
    """A progress bar that is named by the phase and shows the training loss and the phase's own numbers.

    In a run without pruning callbacks it shows the epoch, as Lightning's own bar does, and the loss.

    Args:
        refresh_rate: how many batches pass between two updates; 0 turns the bar off.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._loss: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, before the update that shows it."""
        self._loss = _loss_of(outputs, trainer.accumulate_grad_batches)
        pipeline = Pipeline.of(trainer)
        if pipeline is not None:
            self.train_progress_bar.set_description(pipeline.phase, refresh=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The last batch's loss, what the module logs with `prog_bar=True`, and the pipeline's status."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        pipeline = Pipeline.of(trainer)
        status = {} if pipeline is None else pipeline.status()
        loss = {} if self._loss is None or "train/loss" in metrics else {"loss": self._loss.item()}
        return {**loss, **metrics, **status}


def _loss_of(outputs: Any, accumulate_grad_batches: int) -> torch.Tensor | None:
    """The loss of one batch: callbacks get it divided by the number of batches that one step accumulates."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() * accumulate_grad_batches if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
