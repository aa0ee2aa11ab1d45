"""Random units: the baseline that every selector of width has to beat."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import check_number
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.counts import Keep
from lightprune.selectors.width.units import UnitSelector


class RandomUnitSelector(UnitSelector):
    """Keeps units at random.

    Args:
        heads: query heads a layer that stay, a count or a ratio; None keeps all of each group that stays.
        kv_groups: key-value heads a layer that stay, each with its query heads.
        channels: MLP channels a layer that stay.
        hidden: hidden dimensions that stay.
        multiple_of: ratios of channels and hidden dimensions are rounded to the nearest multiple of this.
        seed: of a random generator of its own.
        start: the optimizer step at which the plan is made.
    """

    needs_batches = False

    def __init__(
        self,
        heads: Keep = None,
        kv_groups: Keep = None,
        channels: Keep = None,
        hidden: Keep = None,
        multiple_of: int = 64,
        seed: int = 0,
        start: Steps = 0,
    ) -> None:
        super().__init__(heads, kv_groups, channels, hidden, multiple_of, start, start, hold_weights=False)
        self.seed = seed

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "seed", self.seed, whole=True)

    def scores(self) -> Mapping[Unit, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = self.pipeline.anatomy.shape

        def draw(*sizes: int) -> Tensor:
            return torch.rand(sizes, generator=generator)

        return {
            "heads": draw(shape.layers, shape.heads),
            "kv_groups": draw(shape.layers, shape.kv_groups),
            "channels": draw(shape.layers, shape.channels),
            "hidden": draw(shape.hidden),
        }

    def choose(self) -> PruningPlan:
        return self.keep(self.scores(), seed=self.seed)
