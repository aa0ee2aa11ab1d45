"""Two real processes, one of which skips a batch while the weights stand still: the other does not wait for it."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import lightprune as lp
from lightprune.selectors import Selector
from tests.training import Batch, Batches, Plain, batches, trainer_for

SKIPPED, STEPS = 1, 3


class Skips(Plain):
    """Rank 1 skips a batch by a loss that is not the LM's: under several ranks Lightning takes no None."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == SKIPPED and self.global_rank == 1:
            return self.lm.lm_head.weight.sum() * 0
        return super().training_step(batch, batch_idx)


class Half(Plain):
    """One process that sees of that batch what rank 0 sees, for half of the mean over ranks."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == SKIPPED:
            half = {name: value.chunk(2)[0] for name, value in batch.items()}
            return super().training_step(half, batch_idx) / 2
        return super().training_step(batch, batch_idx)


class Shards(L.LightningDataModule):
    """Each rank's rows of the same batches."""

    def train_dataloader(self) -> Batches:
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        whole = batches(STEPS + 1, batch=4)
        return Batches([{name: value.chunk(world)[rank] for name, value in batch.items()} for batch in whole])


class Saved(Callback):
    """Saves in the window, after the batch that was skipped, and writes down the plans of its rank."""

    def __init__(self, folder: Path, selectors: list[Selector]) -> None:
        self.folder = folder
        self.selectors = selectors

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == SKIPPED + 1:
            trainer.save_checkpoint(self.folder / "in_window.ckpt")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        plans = [selector.plan.to_dict() for selector in self.selectors if selector.plan is not None]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(plans))


def test_a_rank_that_skips_a_batch(tmp_path: Path) -> None:
    found = []
    for module, devices in ((Skips(), 2), (Half(), 1)):
        selectors: list[Selector] = [
            lp.TaylorUnitSelector(channels=32, hidden=24, multiple_of=1, stop=STEPS),
            lp.GreedyPerplexitySelector(drop=2, stop=STEPS),
        ]
        callbacks = [Saved(tmp_path, selectors), *selectors]
        strategy = "ddp_spawn" if devices == 2 else "auto"
        trainer = trainer_for(callbacks, STEPS + 1, devices=devices, strategy=strategy, use_distributed_sampler=False)
        trainer.fit(module, datamodule=Shards())
        found += [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(devices)]
    first, second, alone = found
    assert first == second
    assert [plan["kept_layers"] for plan in first] == [plan["kept_layers"] for plan in alone]
    scores, expected = (plans[0]["provenance"]["scores"] for plans in (first, alone))
    assert set(expected) == {"channels", "hidden"}
    for unit, values in expected.items():
        assert _flat(scores[unit]) == pytest.approx(_flat(values), rel=1e-3)


def _flat(values: Any) -> list[float]:
    return [number for entry in values for number in _flat(entry)] if isinstance(values, list) else [values]
