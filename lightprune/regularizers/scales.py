"""Scales of what stays: how much each attention and each MLP counts for, learned while the weights stand still."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightprune.errors import ConfigError, check_number
from lightprune.masks.gates import change_output
from lightprune.masks.soft_masks import fold_writer
from lightprune.masks.unit_masks import mask_out
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.base import Regularizer
from lightprune.strategies import adam_on


class ScaleCalibration(Regularizer):
    """Learns a scale for each attention and each MLP that stays, and writes it into the weights at the cut.

    From `start` on the model computes what the cut model will, and the weights stand still, while Adam learns by how
    much the output of each attention and MLP is multiplied; every scale begins at 1. At the cut they are folded into
    the projections (the scales of GRASPrune, arXiv 2604.19398). These are two numbers a layer, so few steps are enough,
    and they hardly overfit. Beside `Distillation` they learn from the teacher, and not from the tokens.

    Args:
        start: the optimizer step at which it begins; None as soon as the plan is decided.
        stop: the optimizer step from which on the scales stand still, and the weights move; None is the cut's `at`.
        lr: Adam's learning rate.
    """

    alters = True
    folds = True

    def __init__(self, start: Steps | None = None, stop: Steps | None = None, lr: float = 0.03) -> None:
        super().__init__(start, stop)
        self.lr = lr
        self._scales = torch.empty(0)  # in the order of the family's writers, of layers that stay
        self._adam: torch.optim.Adam | None = None
        self._saved: dict[str, Any] | None = None
        self._holding = False

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "lr", self.lr, above=0)

    def check(self) -> None:
        super().check()
        if self.pipeline.cut is None:
            raise ConfigError(
                "ScaleCalibration calibrates what a cut leaves, and there is none: add a StructuredCut to "
                "trainer.callbacks."
            )

    @property
    def needs_backward(self) -> bool:
        return not self.cycle.done

    @property
    def skips_layers(self) -> bool:
        return self.removes_layers

    def watch(self, plan: PruningPlan) -> None:
        anatomy = self.pipeline.anatomy
        self._writers = [writer for writer in anatomy.writers() if writer.layer not in plan.dropped_layers]
        self._scales = torch.ones(len(self._writers), device=anatomy.lm.device, requires_grad=True)
        self._adam = adam_on(anatomy.lm.device, [self._scales], lr=self.lr)
        if self._saved is not None:
            self._scales.data.copy_(self._saved["scales"])
            self._adam.load_state_dict(self._saved["adam"])
            self._saved = None
        self._handles += mask_out(anatomy, plan)
        self._handles += [change_output(w.module, self._scaled(place)) for place, w in enumerate(self._writers)]

    def _scaled(self, place: int) -> Callable[[Tensor], Tensor]:
        return lambda output: output * self._scales[place].to(output.dtype)

    def apply(self, elapsed: float) -> None:
        _, end = self.window(self.pipeline.cycle)
        assert end is not None
        learning = self.pipeline.step < end
        if not learning:
            self._release()
        elif not self._holding:
            self._holding = True
            self.pipeline.weights.hold()
        self._scales.requires_grad_(learning)

    def optimizer_step(self) -> None:
        """One step of Adam on the scales."""
        if self._attached and self._holding and self._adam is not None:
            self.pipeline.adapter.optimizer_step(self._adam, held=self.pipeline.weights.held)

    def fold(self) -> None:
        if not self._attached:
            return
        for writer, scale in zip(self._writers, self._scales.detach(), strict=True):
            fold_writer(self.pipeline.adapter.edited, writer, scale)

    def detach(self) -> None:
        super().detach()
        self._release()
        self._adam = None

    def _release(self) -> None:
        if self._holding:
            self.pipeline.weights.release()
        self._holding = False

    def status(self) -> Status:
        return {"scales": len(self._scales)} if self._holding else {}

    def state_dict(self) -> dict[str, Any]:
        learned = self._saved
        if self._attached and self._adam is not None:
            learned = {"scales": self._scales.detach().clone(), "adam": self._adam.state_dict()}
        return {**super().state_dict(), "learned": learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = state_dict["learned"]
