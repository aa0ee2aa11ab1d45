"""`RandomState`: dropout and other randomness of training that a resume repeats bit for bit."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightprune.errors import check_number
from lightprune.integrations.seeding import seed_generators


class RandomState(Callback):
    """Seeds the random generators before every training batch, from one seed and the batch's number.

    A checkpoint of generators' states is not enough: validation loops and data loaders draw from the same generators,
    and not at the same moments in a resumed run. Here the randomness of a batch depends on nothing that came before it.
    It concerns what happens in training steps (Python's, NumPy's and PyTorch's generators, on all devices); the order
    of the data is the data module's business.

    Args:
        seed: at least 0; None takes PyTorch's initial seed (`seed_everything`). The checkpoint's goes before either.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_number(self, "seed", self.seed, whole=True, least=0, optional=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert self.seed is not None
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        seed_generators(self.seed, trainer.global_rank, batches)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
