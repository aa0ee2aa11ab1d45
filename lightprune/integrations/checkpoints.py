"""What lightprune asks of Lightning's checkpointing beyond its public names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

# Lightning 2.6.6: `_CheckpointConnector` and its `_parse_ckpt_path` find what "last" and "hpc" mean. Without them these
# words could not be resolved before there is a trainer.
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn


def found_checkpoint(trainer: Any, ckpt_path: str | None) -> str | None:
    """The path that a fit of this trainer, or of what has its attributes, means by "last", "best" or "hpc"."""
    found = _CheckpointConnector(trainer)._parse_ckpt_path(TrainerFn.FITTING, ckpt_path, True, True)
    return None if found is None else str(found)


def cluster_of(trainer: L.Trainer) -> ClusterEnvironment | None:
    """The cluster that the trainer runs on, whatever its strategy."""
    # Lightning 2.6.6: `_accelerator_connector.cluster_environment`; strategies of one device have no public one.
    # Without it Lightning's own handler of Slurm's signals would come before ours.
    environment: ClusterEnvironment | None = trainer._accelerator_connector.cluster_environment
    return environment


def save_last(saver: ModelCheckpoint, trainer: L.Trainer) -> None:
    """Save the checkpoint that "last" means now, unless this step's is saved."""
    # Lightning 2.6.6: `_last_global_step_saved`, `_save_last_checkpoint` and `_monitor_candidates` are how
    # ModelCheckpoint saves. Without them a preempted run would have to wait for the next regular checkpoint.
    if saver._last_global_step_saved != trainer.global_step:
        saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


@contextmanager
def no_checkpoints(trainer: L.Trainer) -> Iterator[None]:
    """Let no `ModelCheckpoint` save inside the context: to each, this step's checkpoint is there already."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    # Lightning 2.6.6: `_last_global_step_saved`. Without it a step could leave a checkpoint of the model before its
    # cut.
    last_saved = [saver._last_global_step_saved for saver in savers]
    for saver in savers:
        saver._last_global_step_saved = trainer.global_step
    try:
        yield
    finally:
        for saver, step in zip(savers, last_saved, strict=True):
            saver._last_global_step_saved = step
