"""A selector of MLP channels, by the range of their activations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lightprune as lp


class RangeSelector(lp.UnitSelector):
    """Keeps the MLP channels whose activations reach the furthest from zero in the window.

    Args:
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes.
        counts: those of `UnitSelector`.
    """

    def __init__(self, *, start: int = 0, stop: int = 3, **counts: Any) -> None:
        super().__init__(start=start, stop=stop, hold_weights=True, **counts)
        self.furthest = torch.empty(0)

    def watch(self) -> None:
        anatomy = self.pipeline.anatomy
        nothing = torch.zeros(anatomy.num_layers, anatomy.shape.channels)
        self.furthest = (self.furthest if self.furthest.numel() else nothing).to(self.pipeline.lm.device)
        for index, layer in enumerate(anatomy.layers):
            self._handles.append(layer.get_submodule("mlp.down_proj").register_forward_pre_hook(self.record(index)))

    def record(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.pipeline.training:
                here = inputs[0].detach().abs().flatten(0, -2).amax(dim=0)
                self.furthest[index] = torch.maximum(self.furthest[index], here)

        return hook

    def scores(self) -> Mapping[str, Tensor]:
        return {"channels": self.furthest}

    def scores_state(self) -> dict[str, Any]:
        return {"furthest": self.furthest}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self.furthest = state["furthest"]
