"""`PreemptionCheckpoint`: a run that is told to stop saves after its optimizer step and stops, on all ranks together.

A cluster announces the end of a job by a signal: Slurm sends SIGTERM before it takes a job's nodes away, and what its
`--signal` names before the time limit. It comes at any moment, in the middle of a collective or of the cut, and on each
rank at another one. So the handler only notes it. Lightning's own save, requeue and broadcast inside the handler.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightprune.errors import ConfigError, check_number
from lightprune.integrations.atomic_save import save_atomically
from lightprune.integrations.checkpoints import cluster_of, save_last
from lightprune.integrations.ranks import largest_of_ranks

_TRY_AGAIN = 75  # EX_TEMPFAIL, by number since Windows has no name for it


class PreemptionCheckpoint(Checkpoint):
    """Saves `last.ckpt` and ends the process with status 75 once any rank has got SIGUSR1 or SIGTERM.

    That happens at the end of the optimizer step that is under way: gradients that are being accumulated, a validation
    and the cut are finished first. Several ranks ask each other about every `poll_seconds`, after as many steps as take
    that long, after each step if it takes longer, and after each validation. A fit with `ckpt_path="last"` continues as
    if nothing had happened. A signal in what follows the last step (the last validation, the export) changes nothing:
    the run is about to end. And a process that is killed without a signal, in the middle of a save, leaves the
    checkpoint before it whole.

    Python lets only the main thread handle signals. In a fit outside it, this callback warns, and sees none.

    Slurm signals every process of a job, and a data loader whose worker dies ends the run. `TextDataModule` sees to
    that; other data modules pass `worker_init_fn=lightprune.outlive_preemption` to their loaders.

    Args:
        poll_seconds: how long several ranks train, about, before they ask each other for signals again. 0 is each step,
            which then waits for the device.

    Attributes:
        received: the last signal that this rank got; None so far.

    Raises:
        ConfigError: no `ModelCheckpoint` with `save_last: true` is among the trainer's callbacks.
        SystemExit: with status 75 (EX_TEMPFAIL, "try again"), on all ranks, after the checkpoint is written.
    """

    # Windows has no SIGUSR1.
    SIGNALS: ClassVar = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

    def __init__(self, poll_seconds: float = 5.0) -> None:
        self.poll_seconds = poll_seconds
        self.received: signal.Signals | None = None
        self._step = 0
        self._poll_at = 0  # the step after which the ranks ask each other next
        self._polled = (0, 0.0)  # the last step at which they did, and the time
        self._unwrap: Callable[[], object] = lambda: None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_number(self, "poll_seconds", self.poll_seconds, least=0)
        if stage == "fit":
            self._saver(trainer)
            self._unwrap = save_atomically(trainer.strategy)
        environment = cluster_of(trainer)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.received = None
        self._step = self._poll_at = trainer.global_step
        self._polled = trainer.global_step, time.monotonic()
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
            rank_zero_warn(
                "PreemptionCheckpoint cannot see signals, because this fit runs outside the main thread: a run that "
                "is told to stop ends at once, and a resume begins at the last checkpoint that ModelCheckpoint has "
                "written."
            )
            return
        # Until now a signal ends the process, and nothing is lost. Lightning restores what it found before the fit.
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated, which no checkpoint holds
            return
        self._step = trainer.global_step
        if self._stops(trainer):
            self._save(trainer)
            raise SystemExit(_TRY_AGAIN)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._poll_at = self._step  # it took its time, on all ranks

    def _stops(self, trainer: L.Trainer) -> bool:
        """Whether any rank has got a signal. All ranks find the same, at the same step."""
        if trainer.world_size == 1:
            return self.received is not None
        if self._step < self._poll_at:
            return False
        (step, then), now = self._polled, time.monotonic()
        pace = (now - then) / max(self._step - step, 1)
        mine = torch.tensor([self.received is not None, pace], dtype=torch.float32)
        received, slowest = largest_of_ranks(mine.to(trainer.strategy.root_device)).tolist()
        self._poll_at = self._step + max(int(self.poll_seconds / max(slowest, 1e-3)), 1)
        self._polled = self._step, now
        return bool(received)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._unwrap()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._unwrap()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def _save(self, trainer: L.Trainer) -> None:
        saver = self._saver(trainer)
        save_last(saver, trainer)
        cause = "another rank's signal" if self.received is None else self.received.name
        rank_zero_info(f"Stopped by {cause} after step {trainer.global_step}: resume from {saver.last_model_path}.")

    @staticmethod
    def _saver(trainer: L.Trainer) -> ModelCheckpoint:
        """The callback whose last checkpoint `ckpt_path="last"` finds."""
        savers = (saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint))
        saver = next((saver for saver in savers if saver.save_last is True), None)
        if saver is None:
            raise ConfigError(
                "PreemptionCheckpoint saves the checkpoint that `ckpt_path=last` resumes from, and no ModelCheckpoint "
                "keeps it: add "
                "one with save_last: true to trainer.callbacks."
            )
        return saver
