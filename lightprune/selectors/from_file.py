"""A plan from a file: made by an earlier run, or by hand."""

from dataclasses import replace

from lightprune.anatomy import Shape, Structure
from lightprune.errors import ConfigError
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.base import Selector


class PlanFromFile(Selector):
    """Takes the plan that a JSON file holds; read and checked against the model before the first step.

    Args:
        path: the JSON file: an export's `pruning_plan.json`, or what `PruningPlan.save` wrote.
        start: the optimizer step at which it becomes the plan.
    """

    needs_batches = False

    def __init__(self, path: str, start: Steps = 0) -> None:
        super().__init__(start, start, hold_weights=False)
        self.path = path
        self._read: PruningPlan | None = None

    @property
    def structures(self) -> frozenset[Structure]:
        return frozenset(self._planned.structures)

    def target(self, source: Shape) -> Shape:
        plan, anatomy = self._planned, self.pipeline.anatomy
        if self.cycle is self.pipeline.cycles[0]:
            plan.validate(anatomy)
        if (plan.model_type, plan.source) != (anatomy.model_type, source):
            raise ConfigError(
                f"The plan in PlanFromFile.path={self.path!r} was made for {plan.model_type!r} of {plan.source}, and "
                f"by then this model is {anatomy.model_type!r} of {source}: choose the plan that belongs to it."
            )
        return plan.shape

    def check_settings(self) -> None:
        super().check_settings()
        self._read = None  # the file may be another one by now

    def choose(self) -> PruningPlan:
        plan = self._planned
        return replace(plan, provenance={"file": self.path, "made_by": dict(plan.provenance)})

    def foresee(self) -> PruningPlan | None:
        return self._planned

    @property
    def _planned(self) -> PruningPlan:
        """The plan, once decided; before that, the file as it was when the run began."""
        if self.plan is not None:
            return self.plan
        if self._read is None:
            plan = PruningPlan.load(self.path)
            plan.check_indices()
            self._read = plan
        return self._read
