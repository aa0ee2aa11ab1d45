"""A plan from a file: made by an earlier run, or by hand."""

from typing import Any

from lightprune.plan import PruningPlan
from lightprune.selectors.base import Selector


class PlanFromFile(Selector):
    """Takes the plan that a JSON file holds; read and checked against the model before the first step.

    Args:
        path: the JSON file: an export's `pruning_plan.json`, or what `PruningPlan.save` wrote.
    """

    needs_batches = False

    def __init__(self, path: str) -> None:
        super().__init__(0, 0, 0, 0, 0, hold_weights=False)
        self.path = path

    def watch(self) -> None:
        """Needs no batches."""

    def check(self) -> None:
        PruningPlan.load(self.path).validate(self.pipeline.anatomy)

    def choose(self) -> tuple[list[int], dict[str, Any]]:
        plan = PruningPlan.load(self.path)
        return list(plan.dropped_layers), {"file": self.path, "made_by": dict(plan.provenance)}

    def foresee(self) -> PruningPlan | None:
        return self.plan or PruningPlan.load(self.path)
