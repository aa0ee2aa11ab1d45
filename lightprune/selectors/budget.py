"""A budget as an exact shape: all structures shrink by a common ratio, as far as is needed."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import astuple, replace

from lightprune.anatomy import STRUCTURES, Anatomy, Shape, Structure
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from lightprune.surgery.stock_class import check_expressible

Cost = Callable[[Shape], int]
"""What a model of a shape costs; no more than one of whose counts none is smaller."""


def shape_within(
    anatomy: Anatomy, source: Shape, budget: int, cost: Cost, structures: Collection[Structure], multiple_of: int
) -> Shape | None:
    """The largest shape that costs at most `budget` and in which `structures` keep about the same ratio of `source`.

    Channels and hidden dimensions are rounded to `multiple_of`. Where the model's class ties hidden dimensions to its
    heads, they follow the heads.

    Args:
        anatomy: of a model with at least the counts of `source`.
        source: the counts to shrink.
        budget: what it may cost.
        cost: what a shape costs.
        structures: what may shrink; query heads go with their key-value groups if "kv_groups" is among them.
        multiple_of: see above.

    Returns:
        The shape; None if even the smallest one is too large, or the model's class cannot have any of them.
    """
    shapes = _descending(anatomy, source, structures, multiple_of)
    first = bisect_left(shapes, -budget, key=lambda shape: -cost(shape))
    return next((shape for shape in shapes[first:] if _is_expressible(anatomy, shape)), None)


def widened(shape: Shape, most: Shape, budget: int, cost: Cost, multiple_of: int) -> Shape:
    """The shape with as many MLP channels more, by `multiple_of`, as the budget has room for, up to those of `most`."""
    steps = range((most.channels - shape.channels) // multiple_of + 1)

    def wider(step: int) -> Shape:
        return replace(shape, channels=shape.channels + step * multiple_of)

    return wider(bisect_right(steps, budget, key=lambda step: cost(wider(step))) - 1)


def smallest(anatomy: Anatomy, source: Shape, structures: Collection[Structure], multiple_of: int) -> Shape:
    """The smallest shape that `shape_within` considers."""
    return _descending(anatomy, source, structures, multiple_of)[-1]


def shrinkable(anatomy: Anatomy) -> list[Structure]:
    """The structures in which a model can shrink."""
    return [structure for structure in STRUCTURES if structure in {*anatomy.family.structures, "kv_groups"}]


def _descending(anatomy: Anatomy, source: Shape, structures: Collection[Structure], multiple_of: int) -> list[Shape]:
    """Every shape on the way from `source` down that the class can have; no count of one exceeds the one's before."""
    shapes = [source]
    for ratio in _ratios(source, structures, multiple_of):
        shape = _fitted(anatomy, _shrunk(source, ratio, structures, multiple_of), "hidden" in structures)
        if shape is not None and shape != shapes[-1] and _within(shape, shapes[-1]):
            shapes.append(shape)
    return shapes


def _ratios(source: Shape, structures: Collection[Structure], multiple_of: int) -> Iterator[float]:
    """All ratios at which some count changes, descending."""
    steps = {
        (count - 0.5) * multiple / source.count(structure)
        for structure in structures
        for multiple in _multiples(source, structure, multiple_of)
        for count in range(1, -(-source.count(structure) // multiple) + 1)
    }
    yield from sorted({ratio - 1e-9 for ratio in steps}, reverse=True)


def _shrunk(source: Shape, ratio: float, structures: Collection[Structure], multiple_of: int) -> Shape:
    def kept(structure: Structure, multiple: int) -> int:
        there = source.count(structure)
        if structure not in structures:
            return there
        return min(max(int(ratio * there / multiple + 0.5), 1) * multiple, there)

    groups = kept("kv_groups", 1)
    most = groups * source.heads_per_group
    if source.heads_per_group == 1:
        heads = groups = min(kept("heads", 1), groups)
    else:
        heads = min(kept("heads", groups), most)
    return replace(
        source,
        layers=kept("layers", 1),
        kv_groups=groups,
        heads=heads,
        channels=kept("channels", multiple_of),
        hidden=kept("hidden", multiple_of),
    )


def _fitted(anatomy: Anatomy, shape: Shape, hidden_may_change: bool) -> Shape | None:
    """The shape, or the one with the nearest hidden dimensions that the class can have, if there is any."""

    def fits(candidate: Shape) -> bool:
        return not anatomy.family.problems(candidate, anatomy.config)

    if fits(shape):
        return shape
    if not hidden_may_change:
        return None
    most = anatomy.shape.hidden
    outward = (shape.hidden + sign * away for away in range(1, most) for sign in (-1, 1))
    others = (replace(shape, hidden=hidden) for hidden in outward if 1 <= hidden <= most)
    return next(filter(fits, others), None)


def _within(shape: Shape, other: Shape) -> bool:
    return all(mine <= theirs for mine, theirs in zip(astuple(shape), astuple(other), strict=True))


def _multiples(source: Shape, structure: Structure, multiple_of: int) -> range:
    """What counts may be multiples of: query heads of the key-value groups, which may become fewer on the way."""
    if structure == "heads":
        return range(1, source.kv_groups + 1)
    multiple = multiple_of if structure in ("channels", "hidden") else 1
    return range(multiple, multiple + 1)


def _is_expressible(anatomy: Anatomy, shape: Shape) -> bool:
    plan = PruningPlan.arriving_at(anatomy, shape)
    try:
        plan.validate(anatomy)
        check_expressible(anatomy, plan)
    except ConfigError:
        return False
    return True
