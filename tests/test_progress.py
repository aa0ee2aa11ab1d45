"""`PruningProgressBar`: what it shows, when, and on what."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightprune import RandomSelector, RunReport, StructuredCut
from lightprune.callbacks import progress
from lightprune.callbacks.progress import PruningProgressBar


class TinyLM(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
        )
        self.lm = LlamaForCausalLM(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.lm(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(torch.randint(32, (4, 8))))


class RecordingBar(PruningProgressBar):
    """Keeps what the bar says after every batch."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.shown: list[tuple[str, str]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.shown.append((self.train_progress_bar.desc, self.train_progress_bar.postfix))


class Validated(TinyLM):
    """The same with three batches of validation."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.lm(batch, labels=batch).loss)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(list(torch.randint(32, (3, 8))))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(32, (8,))


class EndlessLM(TinyLM):
    """Trains on an endless loader, as a mixture of domains is one."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless())


class Terminal(io.StringIO):
    """Takes what is drawn on a terminal."""

    def isatty(self) -> bool:
        return True


class Totals(Callback):
    """Keeps the bar's position and total at every hook that something slow may follow."""

    def __init__(self, bar: PruningProgressBar) -> None:
        self.bar = bar
        self.training: list[tuple[float, float | None]] = []
        self.validation: list[float | None] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training.append((self.bar.train_progress_bar.n, self.bar.train_progress_bar.total))

    def on_train_batch_end(self, *args: Any) -> None:
        self.on_train_start(*args[:2])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation.append(self.bar.val_progress_bar.total)


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bars be updated as often as batches end."""
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)


class LogLoss(Callback):
    """Keeps the loss of every batch, as `training_step` returned it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.losses.append(loss.item() * trainer.accumulate_grad_batches)


def fit(module: pl.LightningModule, root: Path, *callbacks: Callback, **kwargs: Any) -> None:
    pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **kwargs,
    ).fit(module)


@pytest.mark.usefixtures("every_batch")
def test_shows_phase_and_status(tmp_path: Path) -> None:
    bar = RecordingBar()
    fit(TinyLM(), tmp_path, RandomSelector(drop=1), StructuredCut(at=2), bar, max_steps=4)
    assert [description.rstrip(": ") for description, _ in bar.shown] == ["transfer", "transfer", "recover", "recover"]
    assert all("loss=" in postfix and "dropped=1" in postfix for _, postfix in bar.shown)


@pytest.mark.usefixtures("every_batch")
def test_without_pruning_shows_the_epoch_and_the_undivided_loss(tmp_path: Path) -> None:
    bar, log = RecordingBar(), LogLoss()
    fit(BoringModel(), tmp_path, bar, log, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=2)
    assert {description for description, _ in bar.shown} == {"Epoch 0: "}
    shown = [float(postfix.removeprefix("loss=")) for _, postfix in bar.shown]
    assert shown == pytest.approx(log.losses, rel=1e-2)


@pytest.mark.usefixtures("every_batch")
def test_a_module_that_returns_no_loss(tmp_path: Path) -> None:
    class Manual(BoringModel):
        automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            """Skips the batch."""

        def train_dataloader(self) -> DataLoader:
            return DataLoader(RandomDataset(32, 2))

    bar = RecordingBar()
    fit(Manual(), tmp_path, bar, max_epochs=1)
    assert [postfix for _, postfix in bar.shown] == ["", ""]


def test_refresh_rate_zero_turns_it_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(TinyLM(), tmp_path, RandomSelector(drop=1), StructuredCut(at=2), PruningProgressBar(0), max_steps=4)
    assert "transfer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "settings", "positions", "total"),
    [
        (EndlessLM, {"max_steps": 4}, [0, 1, 2, 3, 4], 4),
        (EndlessLM, {"max_steps": 2, "accumulate_grad_batches": 2}, [0, 0, 1, 1, 2], 2),
        (TinyLM, {"max_steps": 6}, [0, 1, 2, 3, 4, 5, 6], 6),  # over more than one epoch
        (TinyLM, {"max_steps": 9, "max_epochs": 1}, [0, 1, 2, 3, 4], 4),
        (TinyLM, {"max_epochs": 2}, [0, 1, 2, 3, 4, 1, 2, 3, 4], 4),  # batches of an epoch, as in Lightning
        (EndlessLM, {"max_epochs": 1, "max_time": "00:00:00:01"}, None, None),
    ],
)
@pytest.mark.usefixtures("every_batch")
def test_counts_the_steps_of_the_run_or_the_batches_of_an_epoch(
    tmp_path: Path, module: type[TinyLM], settings: dict[str, Any], positions: list[int] | None, total: int | None
) -> None:
    bar = PruningProgressBar()
    totals = Totals(bar)
    fit(module(), tmp_path, bar, totals, **settings)
    assert positions is None or [n for n, _ in totals.training] == positions
    assert {total for _, total in totals.training} == {total}


@pytest.mark.parametrize("settings", [{"max_steps": 4}, {"max_epochs": 1}])
@pytest.mark.parametrize("output", [Terminal, io.StringIO])
def test_nothing_is_shown_without_its_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: type[io.StringIO], settings: dict[str, int]
) -> None:
    """Neither as training starts, nor in the validations of the start, the cut and the end."""
    monkeypatch.setattr(sys, "stdout", output())
    bar = PruningProgressBar()
    totals = Totals(bar)
    parts = [RandomSelector(drop=1), StructuredCut(at=2)]
    fit(Validated(), tmp_path, bar, totals, RunReport(), *parts, num_sanity_val_steps=2, **settings)
    shown = sys.stdout.getvalue()
    assert "select:   0%" in shown
    assert "/4 [" in shown
    assert "/?" not in shown
    assert totals.training[0] == (0, 4)
    assert totals.validation[0] == 2
    assert set(totals.validation[1:]) == {3}


def test_goes_on_from_the_step_of_a_resume(tmp_path: Path) -> None:
    module, bar = EndlessLM(), PruningProgressBar()
    totals = Totals(bar)
    settings: dict[str, Any] = {"default_root_dir": tmp_path, "accelerator": "cpu", "logger": False}
    first = pl.Trainer(max_steps=2, callbacks=[bar], enable_checkpointing=False, **settings)
    first.fit(module)
    first.save_checkpoint(tmp_path / "at2.ckpt")
    again = pl.Trainer(max_steps=5, callbacks=[bar, totals], enable_checkpointing=False, **settings)
    again.fit(module, ckpt_path=tmp_path / "at2.ckpt", weights_only=True)
    assert totals.training[0] == (2, 5)
    assert bar.train_progress_bar.initial == 2


@pytest.mark.parametrize("output", [Terminal, io.StringIO])
def test_reads_the_loss_only_where_the_bar_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: type[io.StringIO]
) -> None:
    """Batches come faster than updates: the first and the last are shown, and no other is waited for."""
    monkeypatch.setattr(sys, "stdout", output())
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 600.0)
    read = []

    class Bar(PruningProgressBar):
        def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            read.append(trainer.global_step)
            return super().get_metrics(trainer, pl_module)

    fit(EndlessLM(), tmp_path, RandomSelector(drop=1), StructuredCut(at=2), Bar(), max_steps=30)
    assert read[:2] == [1, 30]
    assert set(read[2:]) <= {30}  # the end of the epoch
    assert "30/30" in sys.stdout.getvalue()


def test_a_file_gets_a_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    parts = [RandomSelector(drop=1), StructuredCut(at=2), PruningProgressBar()]
    fit(Validated(), tmp_path, *parts, max_steps=30, val_check_interval=2, num_sanity_val_steps=2)
    first, last = sys.stdout.getvalue().splitlines()
    assert first.startswith("select:   0%| 0/30 [")
    assert last.startswith("recover: 100%| 30/30 [")
    assert "loss=" in last


@pytest.mark.parametrize("settings", [{"max_steps": 8}, {"max_epochs": 2}])
def test_an_early_end_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    fit(TinyLM(), tmp_path, PruningProgressBar(), Stop(), **settings)
    assert " 3/8 " in sys.stdout.getvalue() or " 3/4 " in sys.stdout.getvalue()
