"""`PruningProgressBar`: what it shows, batch by batch."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightprune import RandomSelector, StructuredCut
from lightprune.progress import PruningProgressBar


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


def test_shows_phase_and_status(tmp_path: Path) -> None:
    bar = RecordingBar()
    fit(TinyLM(), tmp_path, RandomSelector(drop=1), StructuredCut(at=2), bar, max_steps=4)
    assert [description.rstrip(": ") for description, _ in bar.shown] == ["transfer", "transfer", "recover", "recover"]
    assert all("loss=" in postfix and "dropped=1" in postfix for _, postfix in bar.shown)


def test_without_pruning_shows_the_epoch_and_the_undivided_loss(tmp_path: Path) -> None:
    bar, log = RecordingBar(), LogLoss()
    fit(BoringModel(), tmp_path, bar, log, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=2)
    assert {description for description, _ in bar.shown} == {"Epoch 0: "}
    shown = [float(postfix.removeprefix("loss=")) for _, postfix in bar.shown]
    assert shown == pytest.approx(log.losses, rel=1e-2)


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
