"""Gate annealing: the contribution of what goes is taken from 1 to 0, so that the cut itself changes nothing."""

import math
from typing import Literal, get_args

import torch

from lightprune.errors import ConfigError, check_choice
from lightprune.masks.gates import Bypass, attach_gate
from lightprune.masks.unit_masks import UnitMasks
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.base import Order, Regularizer, ramps

Shape = Literal["linear", "cosine"]


class GateAnnealing(Regularizer):
    """Multiplies what the plan removes by alpha, taken from 1 to 0 while all weights train.

    A layer: X_out = X_in + alpha * (f(X_in) - X_in); at alpha = 0 it is not computed any more. A query head, with its
    key-value group, or an MLP channel: alpha times what it gives to the output projection. A hidden dimension: alpha
    times whatever is written to it, and every norm gives alpha times its own output plus (1 - alpha) times that over
    the kept dimensions alone. At alpha = 0 the model is the cut model. alpha depends on the step alone: (1 - p) for
    "linear", (1 + cos(pi p)) / 2 for "cosine", p in (0, 1] being how much of the ramp is over; the last step of the
    window trains with alpha = 0. (Ours; not in the papers.)

    Args:
        shape: the ramp's shape, "linear" or "cosine".
        start: the optimizer step at which the ramp begins; None as soon as the plan is decided.
        stop: the optimizer step at which alpha is 0; None is the cut's `at`.
        order: everything together ("joint"), or by depth: one after another the layers that go and, beside them, those
            that stay, each with its own heads and channels. Hidden dimensions always take the whole window.
    """

    alters = True

    def __init__(
        self,
        shape: Shape = "linear",
        start: Steps | None = None,
        stop: Steps | None = None,
        order: Order = "joint",
    ) -> None:
        super().__init__(start, stop)
        self.order: Order = order
        self.shape: Shape = shape
        self._plan: PruningPlan
        self._masks: UnitMasks
        self._elapsed = 0.0
        self._bypassed: set[int] = set()

    def check_settings(self) -> None:
        super().check_settings()
        check_choice(self, "shape", self.shape, get_args(Shape))
        check_choice(self, "order", self.order, get_args(Order))

    def check(self) -> None:
        super().check()
        if self.pipeline.cut is None:
            raise ConfigError(
                "GateAnnealing fades units out for a cut, and there is none: add a StructuredCut to trainer.callbacks."
            )

    @property
    def skips_layers(self) -> bool:
        return self.removes_layers

    def watch(self, plan: PruningPlan) -> None:
        anatomy = self.pipeline.anatomy
        self._plan, self._masks = plan, UnitMasks(anatomy, plan)
        gates = self._masks.alpha  # the masks leave those of layers that go unused
        self._handles += [attach_gate(anatomy.layers[index], gates, index, "residual") for index in plan.dropped_layers]
        self._handles.append(self._masks)

    def apply(self, elapsed: float) -> None:
        if elapsed == self._elapsed:  # every callback's hooks come here: write to the device once a step
            return
        self._elapsed = elapsed
        alphas = self._alphas(elapsed)
        self._masks.alpha.copy_(torch.tensor(alphas))
        self._masks.alpha_hidden.fill_(alpha(elapsed, self.shape))
        for index in self._plan.dropped_layers:
            if alphas[index] == 0 and index not in self._bypassed:
                self._bypassed.add(index)
                self._handles.append(Bypass(self.pipeline.anatomy.layers[index], index))

    def _alphas(self, elapsed: float) -> list[float]:
        """Of each layer of the plan's source, if it goes, or else of its heads and channels that do."""
        progress = {
            index: share
            for layers in (self._plan.dropped_layers, self._plan.kept_layers)
            for index, share in ramps(list(layers), elapsed, self.order).items()
        }
        return [alpha(progress.get(index, 0.0), self.shape) for index in range(self._plan.source.layers)]

    def detach(self) -> None:
        super().detach()
        self._bypassed.clear()
        self._elapsed = 0.0

    def status(self) -> Status:
        return {"alpha": alpha(self._elapsed, self.shape)} if self._attached else {}


def alpha(progress: float, shape: Shape) -> float:
    """The gate after the share `progress` of its ramp, from 1 at 0 to exactly 0 at 1."""
    if progress >= 1:
        return 0.0
    return 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
