"""What the regularizers of width share: the groups of weights that a plan removes, and what is left in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightprune.anatomy import UNITS, Anatomy, Structure, Unit
from lightprune.importance.groups import Coupled, Norm, coupled, norms_of
from lightprune.integrations.lightning import logs_now
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.base import Regularizer


@dataclass(frozen=True)
class RemovedGroups:
    """The coupled groups of one structure in one layer (the whole model, for hidden dimensions), and which of them go.

    Attributes:
        unit: the structure.
        places: where its n units lie.
        removed: bool [n], True where a unit goes. A mask and no indices: these would have to be waited for on a GPU.
        count: how many units go.
    """

    unit: Unit
    places: Sequence[Coupled]
    removed: Tensor
    count: int

    @property
    def size(self) -> int:
        """Weights of each unit."""
        return sum(place.size for place in self.places)

    def norms(self, norm: Norm) -> Tensor:
        """The size-normalised norm [n] of every unit's group, whether it goes or stays; see `groups.norms_of`."""
        return norms_of(self.places, norm)


def removed_groups(anatomy: Anatomy, plan: PruningPlan) -> list[RemovedGroups]:
    """The groups of all units that `plan` removes from the layers that it keeps.

    A query head that goes with its whole key-value group is part of that group and is none of its own.
    """
    found = []
    for unit in UNITS:
        for layer in (None,) if unit == "hidden" else plan.kept_layers:
            units = _removed(plan, unit, layer or 0)
            if units:
                places = [p for p in coupled(anatomy, unit, layer) if p.weight.layer not in plan.dropped_layers]
                removed = torch.zeros(plan.source.count(unit), dtype=torch.bool)
                removed[units] = True
                found.append(RemovedGroups(unit, places, removed.to(anatomy.lm.device), len(units)))
    return found


def _removed(plan: PruningPlan, unit: Unit, layer: int) -> list[int]:
    removed, per_group = plan.removed(unit, layer), plan.source.heads_per_group
    if unit == "kv_groups" and per_group == 1:
        return []  # these are the heads
    if unit == "heads" and per_group > 1:
        groups = plan.removed("kv_groups", layer)
        return [head for head in removed if head // per_group not in groups]
    return removed


def shares(groups: Sequence[RemovedGroups]) -> dict[Unit, float]:
    """Of each structure, the part of its weights' sum of squares that lies in the units that go, over all layers.

    From about the removed part of all units, where nothing was done, to 0, where the cut takes away nothing but zeros.
    """
    sums: dict[Unit, list[Tensor]] = {}
    with torch.no_grad():
        for group in groups:
            squares = group.size * group.norms("l2").square()
            sums.setdefault(group.unit, []).append(torch.stack([(squares * group.removed).sum(), squares.sum()]))
    totals = {unit: torch.stack(parts).sum(0).tolist() for unit, parts in sums.items()}
    return {unit: removed / every if every else 0.0 for unit, (removed, every) in totals.items()}


class UnitRegularizer(Regularizer):
    """Works on the coupled groups of the units that the plan removes, in the layers that it keeps.

    Logs `regularize/share/<structure>` (see `shares`) when the window begins and ends, and in it every
    `trainer.log_every_n_steps` steps.
    """

    acts_on = frozenset[Structure](UNITS)

    def __init__(self, start: Steps | None, stop: Steps | None) -> None:
        super().__init__(start, stop)
        self._groups: list[RemovedGroups] = []
        self._shares: dict[Unit, float] = {}
        self._measured: int | None = None

    def watch(self, plan: PruningPlan) -> None:
        self._groups = removed_groups(self.pipeline.anatomy, plan)

    def apply(self, elapsed: float) -> None:
        if not self._groups:  # this cycle takes away layers alone
            return
        step, cycle = self.pipeline.step, self.pipeline.cycle
        ends = (self.window(cycle)[1], cycle.cut and cycle.cut.at)
        if self._measured is None or (step != self._measured and (step in ends or logs_now(self.pipeline.trainer))):
            self._measured, self._shares = step, shares(self._groups)
            self.pipeline.log({f"regularize/share/{unit}": share for unit, share in self._shares.items()})

    def detach(self) -> None:
        super().detach()
        self._groups, self._shares, self._measured = [], {}, None

    def status(self) -> Status:
        return {f"{unit}_share": share for unit, share in self._shares.items()}
