"""Checks that need data, optimizers or a checkpoint, and still come before the first step."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import is_zipfile

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision

from lightprune.errors import ConfigError
from lightprune.integrations.torch_modules import is_fused
from lightprune.pipeline.part import Part, PipelineView
from lightprune.surgery import check_groups_hold_all, check_optimizer


def check_run(pipeline: PipelineView) -> None:
    """Check a run whose data and optimizers are there.

    Raises:
        ConfigError: it cannot work.
    """
    _check_freshness(pipeline)
    _check_windows(pipeline)
    _check_epochs(pipeline)
    _check_length(pipeline)
    _check_clipping(pipeline)
    _check_training(pipeline)
    _check_optimizers(pipeline)


def check_checkpoint(path: str | Path, io: CheckpointIO | None = None) -> None:
    """Check that there is a checkpoint on this machine, if it is not to come from elsewhere.

    Args:
        path: the `ckpt_path`.
        io: what will read it, if it may be something else than PyTorch's files.

    Raises:
        ConfigError: there is nothing, or a file that PyTorch has not saved, or not to its end.
    """
    if "://" in str(path):
        return
    if not Path(path).exists():
        raise ConfigError(f"There is no checkpoint at {str(path)!r}: name an existing one in `ckpt_path`.")
    of_torch = io is None or type(io) is TorchCheckpointIO
    if of_torch and Path(path).is_file() and not is_zipfile(path):
        raise ConfigError(f"{str(path)!r} is no checkpoint, or not a whole one: name another one in `ckpt_path`.")


def check_resume(parts: Sequence[Part], states: Mapping[str, object]) -> None:
    """Check that the states in a checkpoint are those of these parts.

    Raises:
        ConfigError: a part began at another step there: its state would be passed over silently.
    """
    ours = {part.state_key for part in parts}
    for part in parts:
        name = type(part).__qualname__
        others = [key for key in states if key.startswith(name + "{") and key not in ours]
        if part.state_key not in states and others:
            raise ConfigError(
                f"The checkpoint was saved with {others[0]}, and this run has {part.state_key}: resume with the "
                f"steps that {name} had in the run that saved it. A share of the run is another step where "
                "trainer.max_steps is another: give the step itself."
            )


def _check_freshness(pipeline: PipelineView) -> None:
    """Refuse callbacks that hold the state of another run, such as a plan, or a cut that this model never had."""
    before = {part.shaped_by for part in pipeline.parts if part.shaped_by is not None}
    if not pipeline.resumed and any(not run.fitting or run.trainer is not pipeline.trainer for run in before):
        names = ", ".join(dict.fromkeys(type(part).__name__ for part in pipeline.parts))
        raise ConfigError(
            f"The callbacks {names} have been in another trainer's fit, or have loaded a checkpoint, and still hold "
            "what they saw there: make new callbacks in trainer.callbacks for a new run, or resume from a checkpoint "
            "of theirs by `ckpt_path`."
        )
    executed = pipeline.executed
    if executed is not None and pipeline.anatomy.shape == executed.source != executed.shape:
        raise ConfigError(
            "StructuredCut has cut a model already, and this one is still whole: make new callbacks in "
            "trainer.callbacks for a new run, or resume from a checkpoint."
        )


def _check_windows(pipeline: PipelineView) -> None:
    """Refuse selectors that would decide from less than their window, in a run that resumes one without them."""
    for selector in pipeline.selectors:
        missed = selector.needs_batches and selector.start < pipeline.step
        if missed and selector.plan is None and not selector.opened:
            name = type(selector).__name__
            raise ConfigError(
                f"{name}.start is {selector.start}, and this run goes on from step {pipeline.step} of one without "
                f"{name}: set `start` to at least {pipeline.step}, and what follows behind it."
            )


def _check_epochs(pipeline: PipelineView) -> None:
    """Refuse epochs that end in the middle of an accumulation which goes on in the next one."""
    trainer = pipeline.trainer
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not trainer.strategy.handles_gradient_accumulation or batches == math.inf or batches % accumulate == 0:
        return
    if trainer.max_epochs == 1 or 0 <= trainer.max_steps * accumulate <= batches:
        return
    raise ConfigError(
        f"An epoch has {batches} batches, and trainer.accumulate_grad_batches is {accumulate}: DeepSpeed would go on "
        "accumulating where Lightning begins anew. Set trainer.limit_train_batches to a multiple of it, such as "
        f"{int(batches // accumulate * accumulate) or accumulate}, or train for one epoch."
    )


def _check_length(pipeline: PipelineView) -> None:
    """Refuse epochs that would end before the cut: unlike `max_steps`, their length is known only with the data."""
    trainer, cut = pipeline.trainer, pipeline.cut
    counted = pipeline.module.automatic_optimization  # else a batch has as many steps as the module likes
    batches = trainer.num_training_batches
    if cut is None or cut.done or trainer.max_epochs in (None, -1) or not counted or batches == math.inf:
        return
    in_epoch = batches / trainer.accumulate_grad_batches
    # Lightning steps with what an epoch's end has left over, and DeepSpeed does not.
    rounded = math.floor if trainer.strategy.handles_gradient_accumulation else math.ceil
    steps = trainer.max_epochs * rounded(in_epoch)
    if steps < cut.at:
        raise ConfigError(
            f"The run ends after {steps} optimizer steps ({trainer.max_epochs} epochs), before the cut at "
            f"{cut.at}: raise trainer.max_epochs, or lower StructuredCut.at to at most {steps}."
        )


def _check_clipping(pipeline: PipelineView) -> None:
    """Refuse at once what Lightning would refuse at the first step that moves weights, perhaps long after selection."""
    trainer = pipeline.trainer
    fused = [o for o in pipeline.adapter.optimizers if is_fused(o)]
    if trainer.gradient_clip_val and fused and isinstance(trainer.precision_plugin, MixedPrecision):
        raise ConfigError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val} and {type(fused[0]).__name__} is fused, "
            f"which Lightning does not combine under trainer.precision={trainer.precision}: set the optimizer's "
            "`fused` to false, or trainer.gradient_clip_val to null."
        )


def _check_training(pipeline: PipelineView) -> None:
    """Refuse what acts through training where nothing trains; to select, cut and export needs no optimizer."""
    if pipeline.adapter.rates:
        return
    for part in pipeline.parts:
        if part.needs_training:
            raise ConfigError(
                f"{type(part).__name__} acts on weights that train, and {type(pipeline.module).__name__}."
                "configure_optimizers gives nothing to train: return an optimizer there, or leave "
                f"{type(part).__name__} out of trainer.callbacks."
            )


def _check_optimizers(pipeline: PipelineView) -> None:
    """Refuse optimizers that a cut that is still to come could not take parameters out of, or slice the state of."""
    ahead = [cycle for cycle in pipeline.cycles if cycle.cut is not None and not cycle.done]
    cutting = [selector for cycle in ahead for selector in cycle.selectors]
    width = any(selector.structures - {"layers"} for selector in cutting)
    for optimizer in pipeline.adapter.optimizers if cutting else ():
        if width:
            check_optimizer(optimizer, flat=pipeline.adapter.flat)
        else:
            check_groups_hold_all(optimizer)
