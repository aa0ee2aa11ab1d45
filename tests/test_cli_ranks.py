"""The command line on two ranks: every rank trains on its own share of the data, whoever made the loader."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.ports import free_ports

COUNT, WORLD = 12, 2


class Indices(Dataset[int]):
    """The numbers from 0."""

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return COUNT


class Numbers(pl.LightningDataModule):
    """A stock loader of numbers, as any data module of Lightning's has one."""

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(), batch_size=2, shuffle=True)

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(), batch_size=2)


class Writer(pl.LightningModule):
    """Writes down what its rank sees."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[int]] = {"train": [], "val": []}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen["train"] += batch.tolist()
        loss: Tensor = self.layer(torch.ones(1)).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["val"] += batch.tolist()

    def on_train_end(self) -> None:
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_on_two_ranks(folder: Path, options: Sequence[str]) -> list[dict[str, list[int]]]:
    """What each rank saw in `lightprune fit`."""
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": WORLD,
            "strategy": "ddp",
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "lightprune.RunReport", "init_args": {"validate_at_start": True}}],
        },
        "model": {"class_path": "tests.test_cli_ranks.Writer", "init_args": {"folder": str(folder)}},
        "data": {"class_path": "tests.test_cli_ranks.Numbers"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    root = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": str(root),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "lightprune", "fit", "--config", "config.yaml", *options]
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


def test_ranks_share_the_samples_of_a_stock_loader(tmp_path: Path) -> None:
    ranks = fit_on_two_ranks(tmp_path, ["--callback.RunReport.validate_at_start", "false"])
    for rank in ranks:
        assert len(rank["train"]) == COUNT // WORLD
    assert sorted(ranks[0]["train"] + ranks[1]["train"]) == list(range(COUNT))
    assert set(ranks[0]["val"]).isdisjoint(ranks[1]["val"])
