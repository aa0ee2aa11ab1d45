"""Anatomy: where the parts of each supported family lie. A new family is one small file in `families`."""

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS, STRUCTURES, UNITS, Shape, Structure, Unit
from lightprune.anatomy.base import Anatomy, Family, Weight
from lightprune.anatomy.families import FAMILIES
from lightprune.anatomy.registry import anatomy_of, families, register_family

for _family in FAMILIES:
    register_family(_family, replace=True)

__all__ = [
    "CHANNELS",
    "FAMILIES",
    "HEADS",
    "HIDDEN",
    "KV_GROUPS",
    "STRUCTURES",
    "UNITS",
    "Anatomy",
    "Family",
    "Shape",
    "Structure",
    "Unit",
    "Weight",
    "anatomy_of",
    "families",
    "register_family",
]
