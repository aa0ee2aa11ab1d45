"""How much of the model is gone, now and at the end, whichever part of the pipeline removes it."""

from math import prod

import lightning as L

from lightprune.pipeline import Pipeline


def sparsity_of(trainer: L.Trainer, parameters: int, parameters_at_start: int) -> tuple[float, float]:
    """The shares of the model's parameters that are removed now and that will be at the end, both in [0, 1).

    What is cut is gone: 1 - parameters now / at the start. A part that learns masks and whose cut is still to come says
    both shares of what the cuts before leave, in `sparsity` and `target_sparsity`. No other part says what it will come
    to before it has cut.
    """
    pipeline = Pipeline.of(trainer)
    ahead = [] if pipeline is None else [part for part in pipeline.parts if not part.cycle.done]
    left = min(parameters / parameters_at_start, 1.0) if parameters_at_start else 1.0
    stays = prod(1 - part.sparsity for part in ahead)
    will_stay = prod(1 - part.target_sparsity for part in ahead)
    return 1 - left * stays, 1 - left * will_stay
