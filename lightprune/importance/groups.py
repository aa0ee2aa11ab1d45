"""Coupled groups: all the weights that vanish together with one unit, and the norms of these groups.

MLP channel j is row j of the gate and up projections, entry j of their biases, and column j of the down projection.
A key-value group is its k and v rows, the q rows of its query heads and their columns of o; a query head inside a
group is its q rows and its columns of o. A hidden dimension is every row and column that writes or reads it, norms and
embeddings included, tied ones once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightprune.anatomy import Anatomy, Shape, Unit, Weight
from lightprune.anatomy.axes import Run
from lightprune.integrations.zero_params import gathered, whole_shape

Norm = Literal["l1", "l2"]

_SLICE = 2**22  # weights; far fewer than a large embedding has


@dataclass(frozen=True)
class Coupled:
    """Where the units of one structure lie in one weight: one after another, along one of its dimensions.

    Attributes:
        weight: the weight; its parameter is looked up anew each time, so this outlives a change of it.
        dimension: the dimension along which the units lie.
        offset: where the first unit begins.
        rows: rows (or columns) of each unit.
        count: how many units there are, n.
    """

    weight: Weight
    dimension: int
    offset: int
    rows: int
    count: int

    @property
    def size(self) -> int:
        """Weights of each unit here."""
        shape = whole_shape(self.weight.parameter)
        return shape.numel() // shape[self.dimension] * self.rows

    def units(self, tensor: Tensor) -> Tensor:
        """The units' part of `tensor`, which has the weight's shape: a view [n, ...] that can be changed in place."""
        run = tensor.narrow(self.dimension, self.offset, self.count * self.rows)
        return torch.unflatten(run, self.dimension, (self.count, self.rows)).movedim(self.dimension, 0)


def coupled(anatomy: Anatomy, unit: Unit, layer: int | None) -> list[Coupled]:
    """Everywhere that the units of a structure lie in layer `layer`; in the whole model (None) for "hidden"."""
    assert (layer is None) == (unit == "hidden"), "hidden dimensions are the whole model's, other units a layer's"
    found, seen = [], set()
    for site in anatomy.sites():
        if layer is not None and site.layer != layer:
            continue
        for weight in site.weights():
            if weight.parameter not in seen:
                seen.add(weight.parameter)
                found += list(_places(weight, unit, anatomy.shape))
    return found


def per_unit(values: Tensor, units: Tensor) -> Tensor:
    """One value [n] for each unit, in a shape that broadcasts over `units` [n, ...]."""
    return values.view(-1, *[1] * (units.ndim - 1))


def unit_norms(anatomy: Anatomy, unit: Unit, layer: int | None, norm: Norm) -> Tensor:
    """The size-normalised norm [n] of every unit's coupled group in layer `layer` (None, for "hidden": in the model).

    See `norms_of`.
    """
    return norms_of(coupled(anatomy, unit, layer), norm)


def norms_of(groups: Sequence[Coupled], norm: Norm) -> Tensor:
    """The size-normalised norm [n] of every unit over all of the places `groups` where it lies, at least in float32.

    l2: sqrt(sum w^2 / N), l1: sum |w| / N, with N the number of weights that a unit has in all. Groups of different
    structures are so of one scale, that of a weight. Differentiable; the gradient at a group of zeros is zero.
    """
    sums = torch.stack([_Sums.apply(group.weight.parameter, group, norm) for group in groups])  # type: ignore[no-untyped-call]
    total = sums.sum(0) / sum(group.size for group in groups)
    if norm == "l1":
        return total
    positive = total > 0  # the slope of the square root at 0 is infinite
    norms: Tensor = torch.where(positive, total, 1).sqrt() * positive
    return norms


def of_all_units(anatomy: Anatomy, unit: Unit, measure: Callable[[Anatomy, Unit, int | None], Tensor]) -> Tensor:
    """What `measure` says of every unit of a structure: [L, n] layer by layer, for "hidden" [d] of the model."""
    if unit == "hidden":
        return measure(anatomy, unit, None)
    return torch.stack([measure(anatomy, unit, layer) for layer in range(anatomy.num_layers)])


@torch.no_grad()
def unit_ranges(anatomy: Anatomy, unit: Unit, layer: int | None) -> Tensor:
    """How far a unit's weights reach [n] in layer `layer` (None, for "hidden": in the model), in float32.

    In each matrix where the unit lies, the range of its weights (the greatest less the least) over that of the unit
    with the widest range there; the sum over the matrices, so at most their number. Biases have no part in it. This
    is `optipfair`'s measure of a channel, over its gate, up and down projections.
    """
    total: list[Tensor] = []
    for group in coupled(anatomy, unit, layer):
        if len(group.weight.axes) > 1:
            weights = group.units(gathered(group.weight.parameter))
            within = tuple(range(1, weights.ndim))
            ranges = (weights.amax(within) - weights.amin(within)).float()
            total.append(ranges / ranges.max().clamp(min=torch.finfo(ranges.dtype).tiny))
    return torch.stack(total).sum(0)


class _Sums(torch.autograd.Function):
    """Sum w^2 (or |w|) over each unit [n]: one pass over the weight forward, one backward, and no copy of it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Coupled, norm: Norm) -> Tensor:
        ctx.parameter, ctx.group, ctx.norm = parameter, group, norm
        weights = group.units(gathered(parameter))
        precision = torch.promote_types(weights.dtype, torch.float32)
        within = tuple(range(1, weights.ndim))
        longest = max(within, key=lambda dimension: weights.shape[dimension])
        step = max(_SLICE * weights.shape[longest] // weights.numel(), 1)
        power = torch.square if norm == "l2" else torch.abs
        return sum(power(part.to(precision)).sum(within) for part in torch.split(weights, step, longest))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        values = gathered(ctx.parameter)  # anew, for under ZeRO-3 it is let go in between
        gradient = torch.zeros_like(values)
        weights, found = ctx.group.units(values), ctx.group.units(gradient)
        factors = per_unit(slopes[0], weights).to(weights.dtype)
        if ctx.norm == "l2":
            torch.mul(weights, 2 * factors, out=found)
        else:
            torch.sign(weights, out=found).mul_(factors)
        return gradient, None, None


def _places(weight: Weight, unit: Unit, shape: Shape) -> Iterator[Coupled]:
    for dimension, axis in enumerate(weight.axes):
        offset = 0
        for run in axis or ():
            units_of_run, rows = shape.count(run.unit), run.rows(shape)
            if _belongs(run, unit, shape):
                count = shape.count(unit)
                yield Coupled(weight, dimension, offset, units_of_run * rows // count, count)
            offset += units_of_run * rows


def _belongs(run: Run, unit: Unit, shape: Shape) -> bool:
    """Whether a unit takes a part of this run with it: a key-value group its query heads, an only head its group."""
    if unit == "heads" and shape.heads_per_group > 1:
        return run.unit == "heads"
    attention = ("heads", "kv_groups")
    return run.unit == unit or (unit in attention and run.unit in attention)
