"""The cut itself: a model and a plan in, the smaller model out."""

from operator import attrgetter

from torch import nn

from lightprune.anatomy import Anatomy
from lightprune.plan import PruningPlan, apply_to_config


def cut_model(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Execute `plan` on the model, in place. The parameters that stay are the very same objects.

    Hooks on the layers and replaced `forward`s must be gone before. Raises ConfigError if the plan does not fit.
    """
    plan.validate(anatomy)
    layers = anatomy.layers
    parent_path, _, name = anatomy.family.layers.rpartition(".")
    kept = nn.ModuleList(layers[i] for i in plan.kept_layers)
    kept.training = layers.training  # not `train()`: the layers keep modes of their own
    for new, old in enumerate(plan.kept_layers):
        _renumber(anatomy, kept[new], old, new)
    setattr(anatomy.lm.get_submodule(parent_path), name, kept)
    apply_to_config(anatomy.config, plan, anatomy)


def _renumber(anatomy: Anatomy, layer: nn.Module, old: int, new: int) -> None:
    for path in anatomy.family.layer_index:
        owner, _, attribute = path.rpartition(".")
        setattr(attrgetter(owner)(layer) if owner else layer, attribute, new)
    anatomy.family.renumber(layer, old, new)
