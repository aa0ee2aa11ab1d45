"""One device: the module is its own engine, so surgery on the module and on its optimizers is all there is to do."""

import lightning as L
from torch import nn

from lightprune.anatomy import Anatomy
from lightprune.plan import PruningPlan
from lightprune.surgery import Rows, cut_model, remove_parameters, replace_parameter


def cut(trainer: L.Trainer, anatomy: Anatomy, plan: PruningPlan) -> None:
    """Execute `plan` inside a running fit: model, optimizers, schedulers. `global_step` and the loops go on."""

    def on_replace(old: nn.Parameter, new: nn.Parameter, rows: Rows) -> None:
        for optimizer in trainer.optimizers:
            replace_parameter(optimizer, old, new, rows)

    removed = [parameter for i in plan.dropped_layers for parameter in anatomy.layers[i].parameters()]
    cut_model(anatomy, plan, on_replace)
    for optimizer in trainer.optimizers:
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
        remove_parameters(optimizer, schedulers, removed)
