"""How much of the model is gone, now and at the end, whichever part of the pipeline removes it."""

import lightning as L
from torch import nn

from lightprune.pipeline import Pipeline


def parameter_count(module: nn.Module) -> int:
    """The parameters of a module as it is now."""
    return sum(parameter.numel() for parameter in module.parameters())


def sparsity_of(trainer: L.Trainer, parameters: int, parameters_at_start: int) -> tuple[float, float]:
    """The shares of the model's parameters that are removed now and that will be at the end, both in [0, 1).

    A part that learns masks says both, in `sparsity` and `target_sparsity`. What is cut is gone: 1 - parameters now /
    at the start. No other part says what it will come to before it has cut.
    """
    pipeline = Pipeline.of(trainer)
    parts = [] if pipeline is None else pipeline.parts
    cut = 1 - parameters / parameters_at_start if parameters_at_start else 0.0
    now = max([cut, 0.0, *(float(getattr(part, "sparsity", 0.0)) for part in parts)])
    return now, max([now, *(float(getattr(part, "target_sparsity", 0.0)) for part in parts)])
