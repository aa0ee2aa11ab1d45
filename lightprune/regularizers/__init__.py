"""Regularizers: what empties the units that the plan removes, before they are cut."""

from lightprune.regularizers.annealing import GateAnnealing
from lightprune.regularizers.base import Regularizer
from lightprune.regularizers.difference import DifferencePenalty
from lightprune.regularizers.group_lasso import ProximalGroupLasso
from lightprune.regularizers.group_norm import GroupNormPenalty
from lightprune.regularizers.scales import ScaleCalibration

__all__ = [
    "DifferencePenalty",
    "GateAnnealing",
    "GroupNormPenalty",
    "ProximalGroupLasso",
    "Regularizer",
    "ScaleCalibration",
]
