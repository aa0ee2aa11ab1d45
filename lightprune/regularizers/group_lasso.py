"""The proximal group lasso: group norms brought to exactly zero, by the proximal step instead of a gradient."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightprune.errors import check_number
from lightprune.importance.groups import per_unit
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.units import UnitRegularizer


def shrinkage(norms: Tensor, threshold: float) -> Tensor:
    """The share min(1, tau / norm) [n] that soft thresholding by tau takes away from groups of these norms [n]."""
    return (threshold / norms.clamp(min=1e-12)).clamp(max=1)


class ProximalGroupLasso(UnitRegularizer):
    """Shrinks, after each optimizer step, the weights of the units that go by their group soft threshold, in place.

    W_g <- W_g * max(0, 1 - tau / rms(W_g)), for every coupled group W_g of a unit that the plan removes
    (`lightprune.importance.groups`): the proximal operator of tau * sqrt(N_g) * ||W_g||_2 for its N_g weights (Yuan
    and Lin 2006, whose weights sqrt(p_j) these are; Parikh and Boyd 2014, section 6.5.1). Where structures cross,
    in the weights of a channel in a hidden dimension that both go, each structure's step is taken in turn.
    Unlike a penalty this reaches exactly zero, and the optimizer's moments, gradient clipping and logged loss know
    nothing of it.

    With all groups at zero the cut changes nothing, except where a norm counts dimensions that go: hidden dimensions,
    and the heads of OLMo 2. For these `GateAnnealing` is the exact one.

    Args:
        strength: None takes from each norm, at every step, its share of the steps left: the norms fall to zero evenly,
            whatever the gradients do, and are zero after the window's last step. (Weights in half precision lose steps
            below half of their last digit, so there the norms fall late; a warning says so.) A number lambda is the
            group lasso's: tau = lambda * the current learning rate of the weight; how far that leads depends on the
            gradients.
        start: the optimizer step at which it begins; None as soon as the plan is decided.
        stop: the optimizer step by which all groups are zero (with strength None); None is the cut's `at`.
    """

    def __init__(self, strength: float | None = None, start: Steps | None = None, stop: Steps | None = None) -> None:
        super().__init__(start, stop)
        self.strength = strength

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "strength", self.strength, least=0, optional=True)

    def watch(self, plan: PruningPlan) -> None:
        super().watch(plan)
        if not self._groups or self.strength is not None:
            return
        with self.pipeline.adapter.edited(self._groups[0].places[0].weight.parameter) as values:
            dtype = values.dtype  # under DeepSpeed that of the masters
        if self._steps_left() > 1 / torch.finfo(dtype).eps:
            rank_zero_warn(
                f"ProximalGroupLasso shrinks weights in {dtype} over {self._steps_left()} steps, the first of which "
                "are lost in rounding, so that the norms fall late: train with float32 weights (precision bf16-mixed), "
                "or in a shorter window."
            )

    @torch.no_grad()
    def project(self) -> None:
        if not self._groups:
            return
        engine = self.pipeline.adapter
        rates = engine.rates
        strength, left = self.strength or 0.0, self._steps_left()
        for group in self._groups:
            norms = None if self.strength is None else group.norms("l2")
            for place in group.places:
                weight = place.weight.parameter
                rate = rates.get(weight, 0.0)
                # Without a strength tau is the norm divided by the steps left: the last step leaves exactly zero.
                share: float | Tensor = 1 / left if norms is None else shrinkage(norms, strength * rate)
                with engine.edited(weight) as values:
                    units = place.units(values)
                    units.mul_(per_unit(1 - group.removed * share, units))

    def _steps_left(self) -> int:
        """Optimizer steps until the window is over, the one just made included; 1 from then on."""
        _, end = self.window(self.pipeline.cycle)
        assert end is not None
        return max(end - self.pipeline.step, 1)
