"""Magnitude: units by the norms of their weights alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import check_choice
from lightprune.importance.groups import Norm, of_all_units, unit_norms
from lightprune.pipeline.steps import Steps
from lightprune.selectors.width.units import UnitSelector


class MagnitudeUnitSelector(UnitSelector):
    """Keeps the units whose coupled groups of weights have the largest norms; see `lightprune.importance.groups`.

    A baseline, and a weak one in LLMs: what a unit does hangs on activations that its weights say little of.

    Args:
        norm: "l2", the root of the mean of the squared weights, or "l1", the mean of their absolute values.
        start: the optimizer step at which the plan is made.
        counts: those of `UnitSelector`: `heads`, `kv_groups`, `channels`, `hidden`, `multiple_of`, `target`.
    """

    needs_batches = False

    def __init__(self, *, norm: Norm = "l2", start: Steps = 0, **counts: Any) -> None:
        super().__init__(start=start, stop=start, hold_weights=False, **counts)
        self.norm: Norm = norm

    def check_settings(self) -> None:
        super().check_settings()
        check_choice(self, "norm", self.norm, get_args(Norm))

    @torch.no_grad()
    def scores(self) -> Mapping[Unit, Tensor]:
        anatomy = self.pipeline.anatomy
        units: set[Unit] = {*self.units}
        if "heads" in units:
            units.add("kv_groups")
        norms = partial(unit_norms, norm=self.norm)
        return {unit: of_all_units(anatomy, unit, norms) for unit in sorted(units)}

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": self.norm}
