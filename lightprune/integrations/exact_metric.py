"""A metric whose sums stay exact, whatever dtype its module is brought to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def widest(device: torch.device) -> torch.dtype:
    """The dtype to sum in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ExactMetric(Metric):
    """A metric of torchmetrics that follows its module to a device, but not to a dtype."""

    # torchmetrics 1.9: `_apply` is how `module.to(...)` reaches a metric. Without it `module.to(bfloat16)` would round
    # the sums.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        device = fn(torch.zeros((), device=self.device)).device
        return super()._apply(lambda sums: sums.to(device=device, dtype=widest(device)), exclude_state)
