"""What the tests of the callback train: three domains of very different difficulty, and modules of two kinds."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightprune.data import Source, TextDataModule
from lightprune.integrations.lightning import callbacks_of
from lightprune.module import CausalLM
from lightprune.reweighting import DomainReweighting
from tests.data.conftest import byte_tokenizer
from tests.families import tiny_lm
from tests.training import trainer_for

DOMAINS = ["easy", "hard", "middle"]


def write_texts(folder: Path) -> Path:
    """One letter, random letters, and random choices of two words, 40 documents of 10 tokens each."""
    chance = random.Random(0)
    texts = {
        "easy": ["a" * 9 for _ in range(40)],
        "hard": ["".join(chance.choices("bcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(40)],
        "middle": ["".join(chance.choices(("ABC", "XYZ"), k=3)) for _ in range(40)],
    }
    for name, documents in texts.items():
        (folder / f"{name}.txt").write_text("|".join(documents))
    return folder


def text_data(folder: Path, **options: Any) -> TextDataModule:
    defaults: dict[str, Any] = {
        "tokenizer": byte_tokenizer(),
        "block_size": 10,
        "batch_size": 4,
        "weights": dict.fromkeys(DOMAINS, 1.0),
        "validation": 2,
        "num_workers": 0,
        "weights_lag": 1,
        "cache_dir": str(folder / "cache"),
    }
    sources = {name: Source(files=str(folder / f"{name}.txt"), separator="|") for name in DOMAINS}
    return TextDataModule(sources, **(defaults | options))


def causal_lm(folder: Path, lr: float = 0.01) -> CausalLM:
    """The package's own module."""
    if not (folder / "model").exists():
        tiny_lm("llama", vocab_size=257, num_layers=2).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
    return CausalLM(str(folder / "model"), optimizer=lambda p: torch.optim.AdamW(p, lr=lr))


class Stranger(L.LightningModule):
    """Someone's own module: it hands out a loss and nothing else."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": tiny_lm("llama", vocab_size=257, num_layers=layers)})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.inner["net"](input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.inner["net"](input_ids=batch["input_ids"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Written(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        assert step is not None
        self.metrics.setdefault(step, {}).update(metrics)


class Consumed(Callback):
    """Remembers the batches: their tokens, and the samples of each domain."""

    def __init__(self) -> None:
        self.batches: dict[int, list[list[int]]] = {}
        self.domains: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.batches[number] = batch["input_ids"].tolist()
        self.domains[number] = batch["domain"].tolist()


def fit(
    folder: Path,
    callbacks: Sequence[Callback],
    max_steps: int = 12,
    module: L.LightningModule | None = None,
    data: L.LightningDataModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Fit on the texts in `folder` and hand the trainer back."""
    trainer = trainer_for(
        callbacks, max_steps, **{"default_root_dir": folder, "limit_val_batches": 1.0, "logger": Written()} | options
    )
    torch.manual_seed(0)
    trainer.fit(module or causal_lm(folder), datamodule=data or text_data(folder), ckpt_path=ckpt_path)
    return trainer


def reweighting_of(trainer: L.Trainer) -> DomainReweighting:
    return next(callback for callback in callbacks_of(trainer) if isinstance(callback, DomainReweighting))


def metrics_of(trainer: L.Trainer) -> dict[int, dict[str, float]]:
    """What was logged of the domains, by step."""
    logger = trainer.logger
    assert isinstance(logger, Written)
    return {
        step: {name: value for name, value in metrics.items() if name.startswith("domains/")}
        for step, metrics in logger.metrics.items()
        if any(name.startswith("domains/") for name in metrics)
    }
