"""The pipeline: what binds the pruning callbacks of one trainer to its module, its model and its strategy."""

from lightprune.pipeline.callback import PruningCallback
from lightprune.pipeline.fit_end import FinishingCallback, finish_parts
from lightprune.pipeline.part import CuttingPart, Cycle, DecidingPart, Part, PipelineView
from lightprune.pipeline.pipeline import Pipeline
from lightprune.pipeline.stages import Phase, Stage, Status

__all__ = [
    "CuttingPart",
    "Cycle",
    "DecidingPart",
    "FinishingCallback",
    "Part",
    "Phase",
    "Pipeline",
    "PipelineView",
    "PruningCallback",
    "Stage",
    "Status",
    "finish_parts",
]
