"""What the parameters of a model will be once a plan is executed, without executing it."""

from math import prod

import torch

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import length
from lightprune.integrations.zero_params import whole_shape
from lightprune.plan import PruningPlan


def resulting_shapes(anatomy: Anatomy, plan: PruningPlan) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the cut model; a tied one stands once, under its first name."""
    of_weights = {
        weight.path: [None if axis is None else length(axis, plan.shape) for axis in weight.axes]
        for weight in anatomy.weights()
    }
    new_index = {old: new for new, old in enumerate(plan.kept_layers)}
    shapes = {}
    for name, parameter in anatomy.lm.named_parameters():
        before = whole_shape(parameter)
        sizes = of_weights.get(name, [None] * len(before))
        shape = torch.Size(old if size is None else size for old, size in zip(before, sizes, strict=True))
        place = anatomy.layer_of(name)
        if place is not None:
            index, rest = place
            if index not in new_index:
                continue
            name = f"{anatomy.family.layers}.{new_index[index]}.{rest}"
        shapes[name] = shape
    return shapes


def resulting_parameters(anatomy: Anatomy, plan: PruningPlan) -> int:
    """How many parameters the cut model has; tied ones count once."""
    return sum(prod(shape) for shape in resulting_shapes(anatomy, plan).values())
