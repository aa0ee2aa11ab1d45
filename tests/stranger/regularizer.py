"""A penalty on the channels that go."""

import torch
from torch import Tensor

import lightprune as lp
from lightprune.plan import PruningPlan


class ShrinkChannels(lp.Regularizer):
    """Adds the mean square of what the down projections read from the channels that go, more and more until the cut."""

    acts_on = frozenset({"channels"})

    def __init__(self, strength: float = 1.0, start: int | None = None, stop: int | None = None) -> None:
        super().__init__(start, stop)
        self.strength, self.share = strength, 0.0
        self.places: list[tuple[Tensor, Tensor]] = []

    def watch(self, plan: PruningPlan) -> None:
        for index, layer in enumerate(self.pipeline.anatomy.layers):
            weight = layer.get_submodule("mlp.down_proj").weight
            kept = set(plan.kept_channels[index])
            gone = [channel for channel in range(weight.shape[1]) if channel not in kept]
            self.places.append((weight, torch.tensor(gone, device=weight.device)))

    def apply(self, elapsed: float) -> None:
        self.share = elapsed

    def penalty(self) -> Tensor | None:
        if not self.places:
            return None
        squares = [weight.index_select(1, gone).square().mean() for weight, gone in self.places]
        return self.strength * self.share * torch.stack(squares).mean()

    def detach(self) -> None:
        super().detach()
        self.places = []
