"""Hard-concrete masks over all structures (Sheared LLaMA, DRPruning)."""

from lightprune.selectors.hard_concrete.selector import HardConcreteSelector

__all__ = ["HardConcreteSelector"]
