"""How a Lightning strategy trains while the model changes under it: one adapter for each kind of strategy."""

from lightprune.strategies.base import StrategyAdapter
from lightprune.strategies.exact import CPUDeepSpeedStrategy, ExactDeepSpeedStrategy
from lightprune.strategies.part_optimizers import adam_on
from lightprune.strategies.registry import adapter_of, register_adapter

# Earlier names of the same.
Engine, engine_of = StrategyAdapter, adapter_of

__all__ = [
    "CPUDeepSpeedStrategy",
    "ExactDeepSpeedStrategy",
    "StrategyAdapter",
    "adam_on",
    "adapter_of",
    "register_adapter",
]
