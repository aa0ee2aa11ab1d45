"""A plan from a file: made by an earlier run, or by hand."""

from dataclasses import replace

from lightprune.anatomy import Shape, Structure
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from lightprune.selectors.base import Selector


class PlanFromFile(Selector):
    """Takes the plan that a JSON file holds; read and checked against the model before the first step.

    Args:
        path: the JSON file: an export's `pruning_plan.json`, or what `PruningPlan.save` wrote.
        start: the optimizer step at which it becomes the plan.
    """

    needs_batches = False

    def __init__(self, path: str, start: int = 0) -> None:
        super().__init__(start, start, hold_weights=False)
        self.path = path

    @property
    def structures(self) -> frozenset[Structure]:
        return frozenset(PruningPlan.load(self.path).structures)

    def target(self, source: Shape) -> Shape:
        plan = PruningPlan.load(self.path)
        if self.cycle is self.pipeline.cycles[0]:
            plan.validate(self.pipeline.anatomy)
        if plan.source != source:
            raise ConfigError(
                f"The plan in PlanFromFile.path={self.path!r} was made for a model of {plan.source}, and by then this "
                f"one is {source}: choose the plan that belongs to it."
            )
        return plan.shape

    def watch(self) -> None:
        """Needs no batches."""

    def choose(self) -> PruningPlan:
        plan = PruningPlan.load(self.path)
        return replace(plan, provenance={"file": self.path, "made_by": dict(plan.provenance)})

    def foresee(self) -> PruningPlan | None:
        return self.plan or PruningPlan.load(self.path)
