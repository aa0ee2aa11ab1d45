"""`PruningProgressBar`: the phase of the run and the numbers that matter in it, in Lightning's own bar."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf

from lightprune.pipeline import Pipeline

TERMINAL_SECONDS = 0.25
"""The least time between two updates of a bar on a terminal. Each reads the loss, so it waits for the device."""

LOG_SECONDS = 60.0
"""The same where the output is a file, such as the log of a batch job: there every update is a line."""


class PruningProgressBar(TQDMProgressBar):
    """A progress bar that is named by the phase and shows the training loss and the phase's own numbers.

    Where `max_steps` is set, it counts the optimizer steps of the whole run; else the batches of each epoch, as
    Lightning's own bar does. Its total is known from the start, as is that of validation. It is updated at most four
    times a second, and the loss is read from the device only then. Where the output is not a terminal, it prints a line
    a minute. In a run without pruning callbacks it shows the epoch, or "Training", and the loss.

    Args:
        refresh_rate: how many batches pass between two updates at least; 0 turns the bar off.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._loss: torch.Tensor | None = None
        self._accumulated = 1  # the batches of one step: the loss of each comes divided by them
        self._steps: int | None = None  # of the whole run, if that is what the bar counts
        self._done: float = 0  # of what the bar counts
        self._next_update = 0.0
        self._run_bar: Tqdm | None = None

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the run, or of its epochs."""
        trainer = self.trainer
        whole = self._steps is not None
        self._run_bar = self._bar(
            self._description(trainer),
            self._steps if whole else self.total_train_batches,
            initial=trainer.global_step if whole else 0,
        )
        return self._run_bar

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar of the trial validation."""
        longest = self.trainer.num_sanity_val_steps
        return self._bar(self.sanity_check_description, longest, below=not _on_terminal(), leave=False)

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of a validation, below that of the training that it interrupts."""
        inside = self.trainer.state.fn != "validate"
        return self._bar(self.validation_description, self.trainer.num_val_batches, below=inside, leave=not inside)

    def init_test_tqdm(self) -> Tqdm:
        """The bar of a test."""
        return self._bar(self.test_description, self.trainer.num_test_batches)

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a prediction."""
        return self._bar(self.predict_description, self.trainer.num_predict_batches)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar; the length of a trial validation is known only now."""
        super().on_validation_start(trainer, pl_module)
        if trainer.sanity_checking:
            self.val_progress_bar.total = _length(trainer.num_sanity_val_batches)
        elif trainer.state.fn == "fit":
            self._move()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, with its total, before anything else takes its time."""
        self._steps = _steps_of(trainer, pl_module)
        self._next_update = 0.0
        super().on_train_start(trainer, pl_module)
        self._done = self.train_progress_bar.n

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Begin the epoch's bar; in the bar of a whole run, let the time of the first epoch begin."""
        bar = self.train_progress_bar
        if self._steps is None:
            self._done = 0
            super().on_train_epoch_start(trainer, *args)
        elif not bar.disable and bar.n == bar.initial:  # validation may have come before it
            bar.start_t = bar.last_print_t = time.time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Note the loss, which is read only where the bar is updated."""
        self._loss = _loss_of(outputs)
        self._accumulated = trainer.accumulate_grad_batches
        bar = self.train_progress_bar
        self._done = batch_idx + 1 if self._steps is None else trainer.global_step
        if self.is_disabled or bar.disable or not self._due(batch_idx + 1, last=self._done == bar.total):
            return
        self._move()
        bar.set_description(self._description(trainer), refresh=False)
        bar.set_postfix(self.get_metrics(trainer, pl_module))
        self._next_update = time.monotonic() + bar.mininterval

    def on_train_end(self, trainer: pl.Trainer, *args: object) -> None:
        """Show how far the run came."""
        self._move()
        super().on_train_end(trainer, *args)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The last batch's loss, what the module logs with `prog_bar=True`, and the pipeline's status."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        pipeline = Pipeline.of(trainer)
        status = {} if pipeline is None else pipeline.status()
        unknown = self._loss is None or "train/loss" in metrics
        loss = {} if self._loss is None or unknown else {"loss": self._loss.item() * self._accumulated}
        return {**loss, **metrics, **status}

    def _move(self) -> None:
        """Let the bar of the training say how far it is, the next time that it is drawn."""
        if self._run_bar is not None:
            self._run_bar.n = self._done

    def _due(self, batch: int, *, last: bool) -> bool:
        return last or (batch % self.refresh_rate == 0 and time.monotonic() >= self._next_update)

    def _description(self, trainer: pl.Trainer) -> str:
        pipeline = Pipeline.of(trainer)
        if pipeline is not None:
            return pipeline.phase
        return f"Epoch {trainer.current_epoch}" if self._steps is None else self.train_description

    def _bar(
        self,
        description: str,
        total: float | list[int | float] | None,
        *,
        initial: int = 0,
        below: bool = False,
        leave: bool = True,
    ) -> Tqdm:
        """A bar of one loader, or of the first of several: Lightning changes the total with the loader."""
        shared = {"desc": description, "total": _length(total), "initial": initial, "disable": self.is_disabled}
        if not _on_terminal():
            return LineTqdm(**shared, announced=not below, file=sys.stdout, mininterval=LOG_SECONDS)
        return Tqdm(
            **shared,
            position=2 * self.process_position + below,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
            mininterval=TERMINAL_SECONDS,
        )


class LineTqdm(Tqdm):
    """A bar for a file: lines, `mininterval` seconds apart, and nothing that moves a cursor.

    Args:
        announced: whether to write a line at once too, and another one at the end.
        kwargs: as in tqdm.
    """

    LINE_FORMAT = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, *, announced: bool, **kwargs: Any) -> None:
        self._announced = announced
        self._next_line = 0.0 if announced else time.monotonic() + kwargs["mininterval"]
        self._written: float | None = None
        super().__init__(**kwargs, leave=False, smoothing=0, bar_format=self.LINE_FORMAT)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if the last one is old enough."""
        if msg is None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.mininterval
            self._written = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to clear: a line stays."""

    def close(self) -> None:
        """Say how far it came."""
        if not self.disable and self._announced and self._written != self.n:
            self._next_line = 0.0
            self.display()
        super().close()


def _on_terminal() -> bool:
    """Whether a bar can be drawn over and over: on a terminal, or by a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def _steps_of(trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """The optimizer steps of the whole run, where `max_steps` bounds them."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps == -1:
        return None
    batches = trainer.num_training_batches
    if epochs in (None, -1) or batches == math.inf or not module.automatic_optimization:
        return steps
    return min(steps, epochs * math.ceil(batches / trainer.accumulate_grad_batches))


def _length(batches: float | list[int | float] | None) -> float | None:
    """The batches of a loader, or of the first of several, if they are known and finite."""
    if isinstance(batches, list):
        batches = batches[0] if batches else None
    return convert_inf(batches)


def _loss_of(outputs: object) -> torch.Tensor | None:
    """The loss of one batch, as callbacks get it: divided by the number of batches that one step accumulates."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
