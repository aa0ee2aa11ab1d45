"""The number of parameters that a model is expected to keep, if its units stay with given probabilities."""

from collections.abc import Mapping
from math import prod

from torch import Tensor

from lightprune.anatomy import Anatomy, Structure
from lightprune.anatomy.axes import Axis
from lightprune.integrations.zero_params import whole_shape


def expected_parameters(anatomy: Anatomy, is_open: Mapping[Structure, Tensor]) -> float:
    """The expected number of parameters of the cut model; tied ones count once.

    Of each weight, the product over its axes of the expected lengths, times the probability of its layer: exact where
    units of different structures stay independently of each other.

    Args:
        anatomy: of the uncut model.
        is_open: the probability that a unit stays: "layers" [L], "heads" [L, H], "kv_groups" [L, G], "channels"
            [L, I], "hidden" [d]; a structure that is left out stays whole.
    """
    shape = anatomy.shape
    counts = {unit: of_units.cpu().double().sum(-1).tolist() for unit, of_units in is_open.items() if unit != "layers"}
    layers = is_open["layers"].tolist() if "layers" in is_open else [1.0] * shape.layers

    def length(axis: Axis, layer: int | None) -> float:
        total = 0.0
        for run in axis:
            count = counts.get(run.unit, shape.count(run.unit))
            total += run.rows(shape) * (count[layer or 0] if isinstance(count, list) else count)
        return total

    axes = {weight.path: (weight.axes, weight.layer) for weight in anatomy.weights()}
    expected = 0.0
    for name, parameter in anatomy.lm.named_parameters():
        sizes = whole_shape(parameter)
        of_axes, layer = axes.get(name, ((None,) * len(sizes), None))
        lengths = [size if axis is None else length(axis, layer) for axis, size in zip(of_axes, sizes, strict=True)]
        place = anatomy.layer_of(name)
        expected += prod(lengths) * (1.0 if place is None else layers[place[0]])
    return expected
