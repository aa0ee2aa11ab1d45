"""Two real processes: what Lightning does to loaders under DDP, and who sees what."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightprune.data import MixtureLoader, Source, TextDataModule, generated
from lightprune.data.blocks import OrderedSampler
from lightprune.metrics import IGNORE_INDEX
from tests.data.conftest import byte_tokenizer
from tests.families import tiny_lm


class Writer(pl.LightningModule):
    """Writes down what its rank sees; the tokens of every block are unique."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[Any]] = {"train": [], "val": []}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch["input_ids"].tolist())
        loss: Tensor = self.layer(torch.ones(1)).sum()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        counted = batch["labels"][:, 0] != IGNORE_INDEX
        self.seen["val"] += batch["input_ids"][counted].tolist()

    def on_train_end(self) -> None:
        assert isinstance(self.trainer.train_dataloader, MixtureLoader)
        assert isinstance(self.trainer.val_dataloaders.sampler, OrderedSampler)
        (self.directory / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def two_ranks(**length: int) -> pl.Trainer:
    """A trainer of two processes that writes and prints nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",  # use_distributed_sampler stays at its default, True
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **length,
    )


def test_two_ranks_see_disjoint_shares_of_one_sequence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("|".join(f"{i:04d}" for i in range(53)))
    stream = tmp_path / "stream.jsonl"
    stream.write_text("\n".join(f'{{"text": "s{i:03d}"}}' for i in range(41)))

    def data(batch_size: int, cache: Path) -> TextDataModule:
        return TextDataModule(
            {
                "numbers": Source(files=str(text), separator="|"),
                # Both ranks tokenize it, in turns, into one file; 34 of its blocks are for training.
                "stream": Source(files=str(stream), streaming=True, max_blocks=30),
            },
            weights={"numbers": 46, "stream": 30},
            tokenizer=byte_tokenizer(),
            block_size=5,
            batch_size=batch_size,
            validation=7,
            num_workers=0,
            cache_dir=str(cache),
        )

    alone = data(batch_size=4, cache=tmp_path / "alone")
    alone.setup("fit")
    held_out = [row for batch in alone.val_dataloader() for row in batch["input_ids"].tolist()]
    whole = [batch["input_ids"].tolist() for _, batch in zip(range(19), alone.train_dataloader(), strict=False)]
    two_ranks(max_epochs=1).fit(Writer(tmp_path), datamodule=data(batch_size=2, cache=tmp_path / "cache"))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    together = [
        [row for pair in zip(*shares, strict=True) for row in pair]
        for shares in zip(*(rank["train"] for rank in ranks), strict=True)
    ]
    assert len(held_out) == 2 * 7
    assert len(together) == (46 + 30) // 4
    assert together == whole
    # As long as no domain has come round, no block is on two ranks.
    rows = [tuple(row) for batch in together[:12] for row in batch]
    assert len(set(rows)) == len(rows)
    assert sorted(ranks[0]["val"] + ranks[1]["val"]) == sorted(held_out)


class Reader(Writer):
    """Writes down which batches of text its rank has written, and what became of them all."""

    def on_train_end(self) -> None:
        tokens = [domain.train[0].tolist() for domain in self.trainer.datamodule._opened.values()]
        seen = {"wrote": WROTE, "tokens": tokens}
        (self.directory / f"rank{self.global_rank}.json").write_text(json.dumps(seen))


WROTE: list[int] = []


class Noting(TextDataModule):
    """Notes the batches that are written in this process."""

    def setup(self, stage: str) -> None:
        original = generated.write

        def noted(lm: Any, tokenizer: Any, settings: Any, number: int, domain: str) -> Any:
            WROTE.append(number)
            return original(lm, tokenizer, settings, number, domain)

        generated.write = noted
        try:
            super().setup(stage)
        finally:
            generated.write = original


def test_two_ranks_write_one_text_together(tmp_path: Path) -> None:
    tiny_lm(vocab_size=len(byte_tokenizer())).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def data(cache: str) -> TextDataModule:
        written = {"model": str(tmp_path / "model"), "tokens": 400, "length": 12, "batch_size": 4}
        return Noting(
            {"own": {"generated": written}},  # type: ignore[dict-item]
            tokenizer=byte_tokenizer(),
            block_size=8,
            batch_size=2,
            validation=2,
            num_workers=0,
            cache_dir=str(tmp_path / cache),
        )

    alone = data("alone")
    alone.setup("fit")
    batches, expected = len(WROTE), [domain.train[0].tolist() for domain in alone._opened.values()]
    two_ranks(max_steps=1).fit(Reader(tmp_path), datamodule=data("together"))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["tokens"] for rank in ranks] == [expected, expected]
    # Rank 1 writes its own share alone; rank 0 also fills what is missing, if the other one is slow.
    assert ranks[1]["wrote"]
    assert all(number % 2 == 1 for number in ranks[1]["wrote"])
    assert len(ranks[0]["wrote"]) < batches
