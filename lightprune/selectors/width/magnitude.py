"""Magnitude: units by the norms of their weights alone."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import check_choice
from lightprune.importance.groups import Norm, unit_norms
from lightprune.pipeline.steps import Steps
from lightprune.selectors.counts import Keep
from lightprune.selectors.width.units import UnitSelector


class MagnitudeUnitSelector(UnitSelector):
    """Keeps the units whose coupled groups of weights have the largest norms; see `lightprune.importance.groups`.

    A baseline, and a weak one in LLMs: what a unit does hangs on activations that its weights say little of.

    Args:
        heads: query heads a layer that stay, a count or a ratio; None keeps all of each group that stays.
        kv_groups: key-value heads a layer that stay, each with its query heads.
        channels: MLP channels a layer that stay.
        hidden: hidden dimensions that stay.
        multiple_of: ratios of channels and hidden dimensions are rounded to the nearest multiple of this.
        norm: "l2", the root of the mean of the squared weights, or "l1", the mean of their absolute values.
        start: the optimizer step at which the plan is made.
    """

    needs_batches = False

    def __init__(
        self,
        heads: Keep = None,
        kv_groups: Keep = None,
        channels: Keep = None,
        hidden: Keep = None,
        multiple_of: int = 64,
        norm: Norm = "l2",
        start: Steps = 0,
    ) -> None:
        super().__init__(heads, kv_groups, channels, hidden, multiple_of, start, start, hold_weights=False)
        self.norm: Norm = norm

    def check_settings(self) -> None:
        super().check_settings()
        check_choice(self, "norm", self.norm, get_args(Norm))

    @torch.no_grad()
    def scores(self) -> Mapping[Unit, Tensor]:
        anatomy = self.pipeline.anatomy
        units: set[Unit] = {*self.counts.units}
        if "heads" in units:
            units.add("kv_groups")

        def norms(unit: Unit) -> Tensor:
            if unit == "hidden":
                return unit_norms(anatomy, unit, None, self.norm)
            return torch.stack([unit_norms(anatomy, unit, layer, self.norm) for layer in range(anatomy.num_layers)])

        return {unit: norms(unit) for unit in sorted(units)}

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": self.norm}
