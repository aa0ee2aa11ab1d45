"""The difference penalty: stage 2 of TRSP and ELDeR (arXiv 2505.18232)."""

from collections import defaultdict
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from lightprune.anatomy import Structure
from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.importance.groups import Norm
from lightprune.masks.forward_passes import TokenMask, on_output
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.regularizers.base import Order, Ramp, Regularizer, ramps


def layer_difference(hidden_in: Tensor, hidden_out: Tensor, norm: Norm) -> Tensor:
    """How much a layer changes each token, per dimension: [B, T] from hidden states [B, T, d].

    l2 is ||X_out - X_in||_2 / sqrt(d), l1 is ||X_out - X_in||_1 / d: the root mean square and the mean absolute change
    of a dimension. Neither depends on the width d, and its mean over tokens on neither batch nor length. (The paper
    leaves the reduction open, its code sums over the whole tensor: a strength there is not a strength here.)
    """
    difference = (hidden_out - hidden_in).float()
    if norm == "l1":
        return difference.abs().mean(-1)
    # The floor keeps the square root's gradient finite where a layer does nothing at all.
    return difference.square().mean(-1).clamp(min=1e-12).sqrt()


class DifferencePenalty(Regularizer):
    """Adds `strength * sum over chosen layers of mean over tokens ||X_out - X_in||` to the loss; all weights train.

    TRSP and ELDeR, stage 2: a layer whose output equals its input can be left out, so training under the penalty moves
    what the layer knew into the others. See `layer_difference` for the norms' reduction. Where a layer is gated as well
    (`GateAnnealing`), the difference is its own, before the gate.

    Args:
        strength: lambda_2. Against a loss in nats per token.
        norm: "l2" (the paper's main setting) or "l1".
        ramp: "constant", or "linear" from 0 to `strength` through the window.
        relative: divide each token's difference by the size of its input (a constant to the gradient), so that
            `strength` does not depend on the scale of the residual stream, which grows with depth in many models.
        start: the optimizer step at which the penalty begins; None as soon as the plan is decided.
        stop: the optimizer step at which the ramp is complete; None is the cut's `at`.
        order: all chosen layers together ("joint"), or one joining after another by depth.
    """

    acts_on = frozenset[Structure]({"layers"})
    hooks_layers = True

    def __init__(
        self,
        strength: float = 0.1,
        norm: Norm = "l2",
        ramp: Ramp = "constant",
        relative: bool = True,
        start: Steps | None = None,
        stop: Steps | None = None,
        order: Order = "joint",
    ) -> None:
        super().__init__(start, stop)
        self.order: Order = order
        self.strength = strength
        self.norm: Norm = norm
        self.ramp: Ramp = ramp
        self.relative = relative
        self._layers: list[int] = []
        self._strengths: dict[int, float] = {}
        self._seen: dict[int, list[Tensor]] = defaultdict(list)
        self._tokens = TokenMask()
        self._ran_without_gradients = False
        self._last = torch.zeros(())

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "strength", self.strength, least=0)
        check_choice(self, "norm", self.norm, get_args(Norm))
        check_choice(self, "ramp", self.ramp, get_args(Ramp))
        check_choice(self, "order", self.order, get_args(Order))

    def watch(self, plan: PruningPlan) -> None:
        layers = self.pipeline.anatomy.layers
        self._layers = list(plan.dropped_layers)
        self._handles.append(self._tokens.watch(self.pipeline.anatomy.decoder))
        self._handles += [on_output(layers[index], self._record(index)) for index in self._layers]

    def _record(self, index: int) -> Callable[[Tensor, Tensor], None]:
        def use(hidden_in: Tensor, hidden_out: Tensor) -> None:
            if index not in self._strengths:
                return
            if not self.pipeline.training:
                self._ran_without_gradients = True
                return
            change = layer_difference(hidden_in, hidden_out, self.norm)
            if self.relative:
                size = layer_difference(torch.zeros_like(hidden_in), hidden_in.detach(), self.norm)
                change = change / size.clamp(min=1e-6)  # of padding it may be zero, and padding has gradients too
            self._seen[index].append(self._tokens.mean(change))

        return use

    def apply(self, elapsed: float) -> None:
        self._seen.clear()  # of a batch that was skipped
        self._ran_without_gradients = False
        self._strengths = {
            index: self.strength * (share if self.ramp == "linear" else 1.0)
            for index, share in ramps(self._layers, elapsed, self.order).items()
        }

    def penalty(self) -> Tensor | None:
        """The penalty of the forward passes since the last call (usually one; their mean if several)."""
        seen = {index: torch.stack(values).mean() for index, values in self._seen.items()}
        self._seen.clear()
        blind, self._ran_without_gradients = self._ran_without_gradients, False
        if not seen and blind and self._strengths:
            raise ConfigError(
                "DifferencePenalty would do nothing: in a pass that trains, the layers that it acts on ran without "
                "gradients. Do not checkpoint them with use_reentrant=True by yourself; "
                "`gradient_checkpointing_enable` of transformers>=5.23 works either way."
            )
        if not seen:
            return None
        self._last = torch.stack([value.detach() for value in seen.values()]).sum()
        return torch.stack([self._strengths[index] * value for index, value in seen.items()]).sum()

    def detach(self) -> None:
        super().detach()
        self._layers = []
        self._strengths = {}
        self._seen.clear()
        self._ran_without_gradients = False

    def status(self) -> Status:
        return {"difference": float(self._last)} if self._layers else {}
