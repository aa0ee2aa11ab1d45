"""What is checked of the model once the module has built it, and once more just before training starts."""

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from lightprune.errors import ConfigError
from lightprune.pipeline import module_checks
from lightprune.pipeline.part import PipelineView
from lightprune.pipeline.schedule import doomed_layers, expected_shapes
from lightprune.plan import PruningPlan
from lightprune.surgery.stock_class import check_expressible


def check_attached(pipeline: PipelineView) -> None:
    """Check a pipeline's parts, and the shapes that its cuts lead to, against the module and its model.

    Raises:
        ConfigError: something cannot work.
    """
    module, anatomy, cycles = pipeline.module, pipeline.anatomy, pipeline.cycles
    module_checks.check_eager(module, anatomy.lm)
    if pipeline.cut is not None and pipeline.cut.done:
        return
    module_checks.check_no_adapters(module, anatomy.lm)
    begun = any(cycle.done for cycle in cycles)  # then the shapes were checked when the run began
    shapes = [] if begun else expected_shapes(cycles, anatomy)
    for part in pipeline.parts:
        part.check()
    ahead = [cycle for cycle in cycles if cycle.cut is not None and not cycle.done]
    deciding = [selector for cycle in ahead for selector in cycle.selectors]
    units = {structure for selector in deciding for structure in selector.structures} - {"layers"}
    module_checks.check_packed(anatomy, units)
    for part in pipeline.parts:
        if part.folds and part.cycle in ahead:
            module_checks.check_packed_writers(anatomy, type(part).__name__)
    module_checks.check_sliced(module, anatomy, doomed_layers(deciding, anatomy.num_layers), units)
    for shape in shapes[1:]:
        plan = PruningPlan.arriving_at(anatomy, shape)
        plan.validate(anatomy)
        check_expressible(anatomy, plan)


def check_hooks(pipeline: PipelineView) -> None:
    """Refuse checkpointed layers whose hooks are checkpointed with them, as they are before transformers 5.23.

    There hooks run a second time in the backward pass, and the first time, if it is re-entrant, without gradients.

    Raises:
        ConfigError: it says what to do.
    """
    hooking = dict.fromkeys(type(p).__name__ for p in pipeline.parts if p.hooks_layers and not p.cycle.done)
    inside = "__call__" in vars(GradientCheckpointingLayer)
    if hooking and inside and any(getattr(layer, "gradient_checkpointing", False) for layer in pipeline.anatomy.layers):
        raise ConfigError(
            f"Gradient checkpointing is on, and under transformers {transformers.__version__} it would run the hooks "
            f"of {', '.join(hooking)} twice: install transformers>=5.23 (Python 3.11 or later), or switch gradient "
            "checkpointing off."
        )
