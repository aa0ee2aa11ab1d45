"""Stepping what a part optimizes by itself, beside the module's optimizers, with or without a loss scale."""

from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightprune.pipeline import Pipeline


def step_own(optimizer: Optimizer, pipeline: "Pipeline") -> None:
    """Step a part's own optimizer and clear its gradients; under a loss scale the scaler unscales them first.

    Nothing happens where there are no gradients: a batch may have been skipped, or the step be another optimizer's.
    """
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        return
    scaler = getattr(pipeline.trainer.precision_plugin, "scaler", None)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        if pipeline.weights_held:  # else the scaler is updated with the module's own step
            scaler.update()
    optimizer.zero_grad()
