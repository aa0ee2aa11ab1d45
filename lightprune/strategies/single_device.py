"""One device: nothing is wrapped around the module, so nothing has to be made anew."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightprune.strategies.base import Checkpoint, Replaced, Restructure, StrategyAdapter
from lightprune.strategies.part_optimizers import gradients_of
from lightprune.strategies.zero_checkpoint import is_sharded, whole_checkpoint


class SingleDevice(StrategyAdapter):
    """Lightning's `SingleDeviceStrategy`."""

    supports = SingleDeviceStrategy

    def load(
        self, original: Callable[..., Checkpoint], restructure: Restructure, path: Any, *args: Any, **kwargs: Any
    ) -> Checkpoint:
        # What DeepSpeed has saved is read here too, to export it.
        read = whole_checkpoint if is_sharded(path) else lambda path: original(path, *args, **kwargs)
        return super().load(read, restructure, path)

    def rewrapped(self) -> AbstractContextManager[Replaced]:
        return nullcontext({})

    def optimizer_step(self, optimizer: Optimizer, *, held: bool) -> None:
        if gradients_of(optimizer):
            self._step(optimizer, None, held=held)
        optimizer.zero_grad()

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, value: object) -> object:
        return value
