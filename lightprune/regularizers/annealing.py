"""Gate annealing: the chosen layers' contribution is taken from 1 to 0, so that the cut itself changes nothing."""

import math
from typing import Literal

import torch

from lightprune.errors import ConfigError
from lightprune.gates import Bypass, attach_gate
from lightprune.pipeline import Status
from lightprune.regularizers.base import Order, Regularizer


class GateAnnealing(Regularizer):
    """Multiplies the residual branch of the chosen layers by alpha, taken from 1 to 0 while all weights train.

    X_out = X_in + alpha * (f(X_in) - X_in). At alpha = 0 the model is the cut model, and the layer is not computed any
    more. alpha depends on the step alone: (1 - p) for "linear", (1 + cos(pi p)) / 2 for "cosine", p in (0, 1] being how
    much of the ramp is over; the last step of the window trains with alpha = 0. (Ours; not in the papers.)

    Args:
        shape: the ramp's shape, "linear" or "cosine".
        start: the optimizer step at which the ramp begins; None as soon as the plan is decided.
        stop: the optimizer step at which alpha is 0; None is the cut's `at`.
        order: all chosen layers together ("joint"), or one after another by depth.
    """

    def __init__(
        self,
        shape: Literal["linear", "cosine"] = "linear",
        start: int | None = None,
        stop: int | None = None,
        order: Order = "joint",
    ) -> None:
        super().__init__(start, stop, order)
        self.shape = shape
        self._alpha = torch.empty(0)
        self._bypassed: set[int] = set()

    def check(self) -> None:
        super().check()
        if self.pipeline.cut is None:
            raise ConfigError(
                "GateAnnealing fades layers out for a cut, and there is none: add a StructuredCut to trainer.callbacks."
            )

    def watch(self, layers: list[int]) -> None:
        anatomy = self.pipeline.anatomy
        self._alpha = torch.ones(anatomy.num_layers, device=self.pipeline.lm.device)
        self._handles += [attach_gate(anatomy.layers[index], self._alpha, index, "residual") for index in layers]

    def apply(self, progress: dict[int, float]) -> None:
        for index, share in progress.items():
            self._alpha[index] = alpha(share, self.shape)
            if share == 1.0 and index not in self._bypassed:
                self._bypassed.add(index)
                self._handles.append(Bypass(self.pipeline.anatomy.layers[index], index))

    def detach(self) -> None:
        super().detach()
        self._bypassed.clear()

    def status(self) -> Status:
        return {"alpha": float(self._alpha.min())} if self._attached else {}


def alpha(progress: float, shape: Literal["linear", "cosine"]) -> float:
    """The gate after the share `progress` of its ramp, from 1 at 0 to exactly 0 at 1."""
    if progress >= 1:
        return 0.0
    return 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
