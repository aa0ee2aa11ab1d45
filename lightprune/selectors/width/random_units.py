"""Random units: the baseline that every selector of width has to beat."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import check_number
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.width.units import UnitSelector


class RandomUnitSelector(UnitSelector):
    """Keeps units at random.

    Args:
        seed: of a random generator of its own.
        start: the optimizer step at which the plan is made.
        counts: those of `UnitSelector`: `heads`, `kv_groups`, `channels`, `hidden`, `multiple_of`, `target`.
    """

    needs_batches = False

    def __init__(self, *, seed: int = 0, start: Steps = 0, **counts: Any) -> None:
        super().__init__(start=start, stop=start, hold_weights=False, **counts)
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
