"""One device: the module is its own engine, so there is nothing to make whole."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightprune.strategies.base import Engine, Replaced


class SingleDevice(Engine):
    """Lightning's `SingleDeviceStrategy`."""

    supports = SingleDeviceStrategy

    def rewrapped(self) -> AbstractContextManager[Replaced]:
        return nullcontext({})

    def learn(self, optimizer: Optimizer, *, held: bool) -> None:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._step(optimizer, held=held)
        optimizer.zero_grad()

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, value: Any) -> Any:
        return value
