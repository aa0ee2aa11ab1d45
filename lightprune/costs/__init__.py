"""What a model costs, before it is cut: parameters, bytes and FLOPs by formula, and what its shape loses elsewhere."""

from lightprune.costs.costs import Costs, Workload, costs_at_most, costs_of
from lightprune.costs.elsewhere import obstacles

__all__ = ["Costs", "Workload", "costs_at_most", "costs_of", "obstacles"]
