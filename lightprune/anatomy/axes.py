"""What the rows and columns of a weight stand for, in units of the structures that can be pruned.

A projection's weight [out, in] is described by two axes. An axis is a sequence of runs: `HEADS` says that the rows are
query heads, `HEADS + KV_GROUPS + KV_GROUPS` that a fused projection holds the queries, then the keys, then the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Structure = Literal["layers", "heads", "kv_groups", "channels", "hidden"]
Unit = Literal["heads", "kv_groups", "channels", "hidden"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class Shape:
    """The counts that make up a model: what a plan starts from, and what it arrives at.

    Attributes:
        layers: decoder layers.
        hidden: dimensions of the residual stream.
        heads: query heads a layer.
        kv_groups: key-value heads a layer, each shared by `heads / kv_groups` query heads.
        head_dim: dimensions of one head; no plan changes it.
        channels: intermediate dimensions of a layer's MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    channels: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_groups

    def count(self, structure: Structure) -> int:
        """How many units of a structure there are (in each layer, but for layers and hidden dimensions)."""
        return int(getattr(self, structure))

    def distance(self, other: "Shape") -> int:
        """How far another shape is from this one, in hidden dimensions and dimensions of all heads."""
        return abs(self.hidden - other.hidden) + abs(self.heads * self.head_dim - other.heads * other.head_dim)


@dataclass(frozen=True)
class Resize:
    """What a plan does to a model's counts: all that a family's config needs to know of it.

    Attributes:
        source: the counts before.
        target: the counts after.
        kept_layers: indices of the layers that stay, ascending.
    """

    source: Shape
    target: Shape
    kept_layers: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Consecutive rows that belong to the units of one structure, unit after unit.

    Attributes:
        unit: the structure.
        vectors: vectors of `head_dim` that each head or group takes up; 3 where q, k and v of a head lie together.
    """

    unit: Unit
    vectors: int = 1

    def rows(self, shape: Shape) -> int:
        """Rows that each unit takes up."""
        return self.vectors * shape.head_dim if self.unit in ("heads", "kv_groups") else 1


Axis = tuple[Run, ...]

HIDDEN: Axis = (Run("hidden"),)
CHANNELS: Axis = (Run("channels"),)
HEADS: Axis = (Run("heads"),)
KV_GROUPS: Axis = (Run("kv_groups"),)


def of_attention(axis: Axis) -> bool:
    """Whether all of an axis belongs to attention's heads, and nothing to the MLP."""
    return all(run.unit in ("heads", "kv_groups") for run in axis)


def length(axis: Axis, shape: Shape) -> int:
    """How long an axis is in a model of this shape."""
    return sum(run.rows(shape) * shape.count(run.unit) for run in axis)


def rows_of(units: Sequence[int], rows: int, offset: int = 0) -> Tensor:
    """The rows [len(units) * rows] that units take up where each has `rows` of them, the first unit's at `offset`."""
    first = torch.tensor(units, dtype=torch.long).unsqueeze(1) * rows + offset
    return (first + torch.arange(rows)).flatten()
