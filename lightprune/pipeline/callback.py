"""`PruningCallback`: the Lightning hooks of a part."""

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer

from lightprune.pipeline.part import Part
from lightprune.pipeline.pipeline import Pipeline


class PruningCallback(Part):
    """A part that a trainer drives: selectors, regularizers, cuts and recoveries derive from it.

    The hooks of the first part move all parts, in the order of their stages. So the order of `trainer.callbacks` does
    not matter.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        Pipeline.open(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pipeline := self._driven(trainer):
            pipeline.check_run()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if pipeline := self._driven(trainer):
            pipeline.begin_batch()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self.pipeline.weights.held and self.pipeline.adapter.stepping:
            self.optimizer_step()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if pipeline := self._driven(trainer):
            pipeline.end_batch()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pipeline := self._driven(trainer):
            pipeline.evaluate()

    on_test_start = on_predict_start = on_validation_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pipeline := self._driven(trainer):
            pipeline.finish()

    on_fit_end = on_train_end  # where a resume finds training over, this is the first hook that is called

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close(trainer)

    def _driven(self, trainer: L.Trainer) -> Pipeline | None:
        """The pipeline, if this part is the one whose hooks move it; else None."""
        pipeline = Pipeline.of(trainer)
        return pipeline if pipeline is not None and self is pipeline.parts[0] else None

    @staticmethod
    def _close(trainer: L.Trainer) -> None:
        if (pipeline := Pipeline.of(trainer)) is not None:  # an exception may come before any part was set up
            pipeline.close()
