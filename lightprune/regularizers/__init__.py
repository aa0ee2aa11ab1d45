"""Regularizers: what empties the units that the plan removes, before they are cut."""

from lightprune.regularizers.annealing import GateAnnealing
from lightprune.regularizers.base import Regularizer
from lightprune.regularizers.difference import DifferencePenalty

__all__ = ["DifferencePenalty", "GateAnnealing", "Regularizer"]
