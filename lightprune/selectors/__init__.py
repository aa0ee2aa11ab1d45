"""Selectors: which layers, heads, channels and hidden dimensions stay. One interface, however they are scored."""

from lightprune.selectors.base import LayerSelector, Selector
from lightprune.selectors.depth.block_influence import BlockInfluenceSelector
from lightprune.selectors.depth.greedy_perplexity import GreedyPerplexitySelector
from lightprune.selectors.depth.layer_gates import LayerGateSelector
from lightprune.selectors.depth.random import RandomSelector
from lightprune.selectors.from_file import PlanFromFile
from lightprune.selectors.hard_concrete.selector import HardConcreteSelector
from lightprune.selectors.target import Target
from lightprune.selectors.width.activation import ActivationUnitSelector
from lightprune.selectors.width.magnitude import MagnitudeUnitSelector
from lightprune.selectors.width.projected_gates import ProjectedGateSelector
from lightprune.selectors.width.random_units import RandomUnitSelector
from lightprune.selectors.width.taylor import TaylorUnitSelector
from lightprune.selectors.width.units import UnitSelector

__all__ = [
    "ActivationUnitSelector",
    "BlockInfluenceSelector",
    "GreedyPerplexitySelector",
    "HardConcreteSelector",
    "LayerGateSelector",
    "LayerSelector",
    "MagnitudeUnitSelector",
    "PlanFromFile",
    "ProjectedGateSelector",
    "RandomSelector",
    "RandomUnitSelector",
    "Selector",
    "Target",
    "TaylorUnitSelector",
    "UnitSelector",
]
