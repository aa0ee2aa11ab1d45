"""Random layers: the baseline that every selector has to beat."""

import random

from lightprune.errors import check_number
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.base import LayerSelector
from lightprune.selectors.target import Target


class RandomSelector(LayerSelector):
    """Drops layers at random.

    Args:
        drop: how many layers go; None where `target` says it.
        seed: of a random generator of its own.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
        target: what the model must come out within, see `lightprune.Target`; as few layers go as that needs.
        start: the optimizer step at which the plan is made.
    """

    needs_batches = False

    def __init__(
        self,
        drop: int | None = None,
        seed: int = 0,
        protect_first: int = 0,
        protect_last: int = 0,
        start: Steps = 0,
        target: Target | None = None,
    ) -> None:
        super().__init__(drop, start, start, protect_first, protect_last, hold_weights=False, target=target)
        self.seed = seed

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "seed", self.seed, whole=True)

    def choose_layers(self) -> tuple[list[int], dict[str, object]]:
        return random.Random(self.seed).sample(self.candidates, self.drop), {"seed": self.seed}

    def foresee(self) -> PruningPlan | None:
        return self.plan or self.choose()
