"""`Mixer`: from losses and references to mixture weights, by one of the rules.

Shapes: [D] float64, one entry for each domain; NaN where a loss or a reference is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lightprune.reweighting.ratio import FROM, follow
from lightprune.reweighting.robust import Array, scale_reference, sheared_weights, worst_case_weights

Rule = Literal["robust", "sheared", "constant"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Comparison:
    """What an update compared.

    Attributes:
        reference: [D], as the rule took it.
        excess: [D], the losses minus that.
    """

    reference: Array
    excess: Array


class Mixer:
    """Holds the weights q and the reference ratio p, [D] each, and moves them.

    Args:
        initial: [D], the ratio that the run began with; at least 0, sum 1. A domain of 0 stays out.
        rule: "robust" is group DRO on the chi-square ball around p, "sheared" Sheared LLaMA's, "constant" none.
        radius: ρ of the ball.
        floor: the least q/p before q is normalized.
        dynamic_ratio: whether p follows q.
    """

    def __init__(self, initial: Array, *, rule: Rule, radius: float, floor: float, dynamic_ratio: bool) -> None:
        self.initial = initial
        self.ratio = initial
        self.weights = initial
        self.rule = rule
        self.radius = radius
        self.floor = floor
        self.dynamic_ratio = dynamic_ratio

    def update(self, losses: Array, reference: Array | None, progress: float) -> Comparison:
        """Move weights and ratio.

        Where a domain in use has no loss yet, or no reference, its excess counts as the mean of the others. Where none
        has both, nothing moves.

        Args:
            losses: [D] now.
            reference: [D]; None where there is none to compare with.
            progress: the share of the steps that are done.
        """
        reference = np.full_like(losses, np.nan) if reference is None else reference
        known = np.isfinite(losses) & np.isfinite(reference) & (self.initial > 0)
        if self.rule == "robust" and known.any():
            reference = reference.copy()
            reference[known] = scale_reference(losses[known], reference[known])
        excess = losses - reference
        if known.any():
            mean = np.average(excess[known], weights=self.initial[known])
            self._move(np.where(known, excess, mean), progress)
        return Comparison(reference, excess)

    def _move(self, excess: Array, progress: float) -> None:
        if self.rule == "sheared":
            self.weights = sheared_weights(self.weights, excess)
        elif self.rule == "robust":
            self.weights = worst_case_weights(excess, self.ratio, self.radius, self.floor)
            if self.dynamic_ratio and progress >= FROM:
                self.ratio = follow(self.ratio, self.weights, self.initial)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("initial", "ratio", "weights")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("initial", "ratio", "weights"):
            setattr(self, name, np.array(state[name]))
