"""The group norm penalty: the regularization stage of DReSS (arXiv 2501.17905)."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import check_choice, check_number
from lightprune.importance.groups import Norm
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.base import Ramp
from lightprune.regularizers.units import RemovedGroups, UnitRegularizer


def mean_norms(groups: Sequence[RemovedGroups], norm: Norm) -> dict[Unit, Tensor]:
    """Of each structure, the mean group norm [] of the units that go, over all layers; gradients reach the weights."""
    sums: dict[Unit, list[Tensor]] = {}
    for group in groups:
        sums.setdefault(group.unit, []).append((group.norms(norm) * group.removed).sum())
    counts = {unit: sum(group.count for group in groups if group.unit == unit) for unit in sums}
    return {unit: torch.stack(of_layers).sum() / counts[unit] for unit, of_layers in sums.items()}


class GroupNormPenalty(UnitRegularizer):
    """Adds `strength * sum over structures of mean over units ||W_unit||` to the loss, for the units that go.

    DReSS: under the penalty the weights of what will be cut shrink, and what they did moves into the others. A unit's
    group W_unit is all the weights that vanish together with it (`lightprune.importance.groups`); its norm is a root
    mean square (l2) or a mean absolute value (l1), and the mean runs over the units of one structure in all layers
    that stay, so that neither the size of a group nor the number of units changes what a `strength` does. (The
    paper leaves the coupling of rows and columns, the reduction and the strength open.)

    Args:
        strength: lambda, against a loss in nats per token: with `relative`, what a structure adds as the window begins.
            It is spread thin, over all weights that go: on a third of the channels of SmolLM2-135M, the default pulls
            about as hard as the gradient of 1,024 tokens does. Weights that stay are not pulled on.
        norm: "l2" or "l1".
        ramp: "constant", or "linear" from 0 to `strength` through the window.
        relative: divide each structure's mean by what it was when the window began, so that `strength` does not depend
            on the scale of the weights either.
        start: the optimizer step at which the penalty begins; None as soon as the plan is decided.
        stop: the optimizer step at which the ramp is complete; None is the cut's `at`.
    """

    def __init__(
        self,
        strength: float = 1e3,
        norm: Norm = "l2",
        ramp: Ramp = "constant",
        relative: bool = True,
        start: Steps | None = None,
        stop: Steps | None = None,
    ) -> None:
        super().__init__(start, stop)
        self.strength = strength
        self.norm: Norm = norm
        self.ramp: Ramp = ramp
        self.relative = relative
        self._now = 0.0
        self._references: dict[int, dict[Unit, float]] = {}  # by cycle

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "strength", self.strength, least=0)
        check_choice(self, "norm", self.norm, get_args(Norm))
        check_choice(self, "ramp", self.ramp, get_args(Ramp))

    def watch(self, plan: PruningPlan) -> None:
        super().watch(plan)
        cycle = self.pipeline.cycle.index
        if cycle not in self._references:
            with torch.no_grad():
                means = mean_norms(self._groups, self.norm)
            self._references[cycle] = {unit: mean.item() or 1.0 for unit, mean in means.items()}

    def apply(self, elapsed: float) -> None:
        super().apply(elapsed)
        self._now = self.strength * (elapsed if self.ramp == "linear" else 1.0)

    def penalty(self) -> Tensor | None:
        """The penalty on the weights as they are now."""
        if not self._groups or not self._now:
            return None
        references = self._references[self.pipeline.cycle.index] if self.relative else {}
        means = mean_norms(self._groups, self.norm)
        return self._now * torch.stack([mean / references.get(unit, 1.0) for unit, mean in means.items()]).sum()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "references": self._references}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._references = state_dict["references"]
