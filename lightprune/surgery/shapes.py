"""What the parameters of a model will be once a plan is executed, without executing it."""

from math import prod

import torch

from lightprune.anatomy import Anatomy, Shape
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


def parameters_in_shape(anatomy: Anatomy, shape: Shape) -> int:
    """How many parameters a model of this shape has at most, whichever units it keeps; tied ones count once.

    What `resulting_parameters` says of `PruningPlan.arriving_at`, from the axes' lengths alone.
    """
    axes = {weight.path: weight.axes for weight in anatomy.weights()}
    outside, layers = 0, [[0, 0] for _ in range(anatomy.num_layers)]  # of each layer, its parameters before and after
    for name, parameter in anatomy.lm.named_parameters():
        sizes = whole_shape(parameter)
        of_axes = axes.get(name, (None,) * len(sizes))
        after = prod(size if axis is None else length(axis, shape) for axis, size in zip(of_axes, sizes, strict=True))
        place = anatomy.layer_of(name)
        if place is None:
            outside += after
        else:
            layers[place[0]][0] += sizes.numel()
            layers[place[0]][1] += after
    largest = sorted(layers, key=lambda counts: -counts[0])[: shape.layers]
    return outside + sum(after for _, after in largest)
