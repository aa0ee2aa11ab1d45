"""Selectors: which layers go. One interface, however they are scored."""

from lightprune.selectors.base import Selector
from lightprune.selectors.block_influence import BlockInfluenceSelector
from lightprune.selectors.from_file import PlanFromFile
from lightprune.selectors.greedy_perplexity import GreedyPerplexitySelector
from lightprune.selectors.layer_gates import LayerGateSelector
from lightprune.selectors.random import RandomSelector

__all__ = [
    "BlockInfluenceSelector",
    "GreedyPerplexitySelector",
    "LayerGateSelector",
    "PlanFromFile",
    "RandomSelector",
    "Selector",
]
