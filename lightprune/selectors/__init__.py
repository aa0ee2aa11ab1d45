"""Selectors: which layers, heads, channels and hidden dimensions stay. One interface, however they are scored."""

from lightprune.selectors.activation import ActivationUnitSelector
from lightprune.selectors.base import Selector
from lightprune.selectors.block_influence import BlockInfluenceSelector
from lightprune.selectors.from_file import PlanFromFile
from lightprune.selectors.greedy_perplexity import GreedyPerplexitySelector
from lightprune.selectors.hard_concrete import HardConcreteSelector
from lightprune.selectors.layer_gates import LayerGateSelector
from lightprune.selectors.magnitude import MagnitudeUnitSelector
from lightprune.selectors.random import RandomSelector
from lightprune.selectors.random_units import RandomUnitSelector
from lightprune.selectors.taylor import TaylorUnitSelector

__all__ = [
    "ActivationUnitSelector",
    "BlockInfluenceSelector",
    "GreedyPerplexitySelector",
    "HardConcreteSelector",
    "LayerGateSelector",
    "MagnitudeUnitSelector",
    "PlanFromFile",
    "RandomSelector",
    "RandomUnitSelector",
    "Selector",
    "TaylorUnitSelector",
]
