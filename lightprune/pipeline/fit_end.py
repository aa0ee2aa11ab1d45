"""`FinishingCallback`: what is done when training is over, also where a resume finds that it was over already."""

from abc import ABC, abstractmethod

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightprune.pipeline.pipeline import Pipeline


class FinishingCallback(Callback, ABC):
    """Calls `finish` exactly once at the end of a fit that succeeds.

    A fit that resumes at its last step trains no more, and Lightning then skips the training loop with all its hooks,
    `on_train_end` among them (2.6: `FitLoop.run`). What it still calls once everything is loaded is `on_fit_end`
    (`Trainer._run`). By then the strategy is torn down, so nothing is validated there.
    """

    _finished = False

    @abstractmethod
    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is to be done; the module is on its device."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._finished = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        finish_parts(trainer)
        self.finish(trainer, pl_module)
        self._finished = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._finished:
            return
        # The strategy has left the module on the CPU, where not every attention implementation runs.
        pl_module.to(trainer.strategy.root_device)
        finish_parts(trainer)
        self.finish(trainer, pl_module)
        self._finished = True
        pl_module.cpu()


def finish_parts(trainer: L.Trainer) -> None:
    """Let the pruning callbacks leave an ordinary model, wherever in the trainer's list they stand."""
    pipeline = Pipeline.of(trainer)
    if pipeline is not None:
        pipeline.finish()
