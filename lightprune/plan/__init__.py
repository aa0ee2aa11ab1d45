"""The pruning plan: what of a model stays, as JSON; validated, with the config and the size that result."""

from lightprune.plan.plan import PruningPlan, apply_to_config

__all__ = ["PruningPlan", "apply_to_config"]
