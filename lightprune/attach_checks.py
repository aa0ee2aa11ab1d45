"""What is checked once the module has built its model, and before the strategy wraps it."""

from typing import TYPE_CHECKING

from lightprune import module_checks
from lightprune.cycle import expected_shapes
from lightprune.expressible import check_expressible
from lightprune.plan import PruningPlan

if TYPE_CHECKING:
    from lightprune.pipeline import Pipeline


def check_attached(pipeline: "Pipeline") -> None:
    """Check a pipeline's parts, and the shapes that its cuts lead to, against the module and its model.

    Raises:
        ConfigError: something cannot work.
    """
    module, anatomy, cycles = pipeline.module, pipeline.anatomy, pipeline.cycles
    module_checks.check_eager(module)
    if pipeline.cut is not None and pipeline.cut.done:
        return
    begun = any(cycle.done for cycle in cycles)  # then the shapes were checked when the run began
    shapes = [] if begun else expected_shapes(cycles, anatomy)
    for part in pipeline.parts:
        part.check()
    ahead = [cycle for cycle in cycles if cycle.cut is not None and not cycle.done]
    doomed = {structure for cycle in ahead for selector in cycle.selectors for structure in selector.structures}
    module_checks.check_sliced(module, anatomy, doomed)
    for shape in shapes[1:]:
        plan = PruningPlan.arriving_at(anatomy, shape)
        plan.validate(anatomy)
        check_expressible(anatomy, plan)
