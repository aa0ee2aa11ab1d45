"""A Lightning strategy that derives from none of Lightning's own, and how lightprune works under it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightprune.strategies import StrategyAdapter


class PlainStrategy(Strategy):
    """One process on the CPU; it hands the model to its optimizers anew whenever `prepared` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.global_rank = self.local_rank = self.node_rank = 0
        self.world_size = 1
        self.preparations = 0

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self.prepare()

    def prepare(self) -> None:
        """What the strategy does once it knows all parameters, and again after a cut."""
        self.preparations += 1

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @property
    def is_global_zero(self) -> bool:
        return True

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """One process waits for no other."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


class PlainAdapter(StrategyAdapter):
    """How lightprune cuts a model that `PlainStrategy` trains."""

    supports = PlainStrategy

    @contextmanager
    def rewrapped(self) -> Iterator[dict[nn.Parameter, Any]]:
        yield {}
        self.strategy.prepare()
