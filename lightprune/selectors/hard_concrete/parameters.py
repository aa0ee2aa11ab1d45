"""The budget of parameters that HardConcreteSelector's structures share, as a shape."""

from collections.abc import Sequence
from functools import partial

from lightprune.anatomy import Anatomy, Shape, Structure
from lightprune.errors import ConfigError, is_whole
from lightprune.selectors.budget import shape_within, shrinkable, smallest
from lightprune.surgery import parameters_in_shape


def shape_of_budget(
    anatomy: Anatomy,
    source: Shape,
    parameters: int | float,
    structures: Sequence[Structure] | None,
    multiple_of: int,
) -> Shape:
    """The shape that a selector's `parameters`, a count or a ratio of the model's, comes to; see `shape_within`.

    Raises:
        ConfigError: there is none.
    """
    possible = shrinkable(anatomy)
    sharing = possible if structures is None else list(structures)
    unknown = [structure for structure in sharing if structure not in possible]
    if unknown or not sharing:
        raise ConfigError(
            f"HardConcreteSelector.structures is {sharing}: {anatomy.model_type} can shrink in {', '.join(possible)}; "
            "choose at least one of these."
        )
    cost = partial(parameters_in_shape, anatomy)
    there = cost(source)
    is_ratio = isinstance(parameters, float)
    is_number = is_ratio or is_whole(parameters)
    if not is_number or not 0 < parameters < (1 if is_ratio else there):
        raise ConfigError(
            f"HardConcreteSelector.parameters is {parameters!r}: it must be a whole number below the model's "
            f"{there:,}, or a ratio between 0 and 1."
        )
    budget = int(parameters * there) if is_ratio else int(parameters)
    shape = shape_within(anatomy, source, budget, cost, sharing, multiple_of)
    if shape is None:
        least = cost(smallest(anatomy, source, sharing, multiple_of))
        raise ConfigError(
            f"HardConcreteSelector.parameters is {parameters}: {', '.join(sharing)} can shrink to {least:,} parameters "
            "at the least; raise `parameters`, add to `structures`, or lower `multiple_of`."
        )
    return shape
