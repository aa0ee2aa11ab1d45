"""Taylor: units by what the loss would change, to first order, if they were gone."""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.anatomy.axes import CHANNELS, HEADS
from lightprune.errors import check_choice
from lightprune.gates import change_input, change_output
from lightprune.selectors.calibration import CalibratedUnitSelector, accumulator
from lightprune.selectors.counts import Keep
from lightprune.steps import Steps

Accumulate = Literal["squared", "absolute"]


class TaylorUnitSelector(CalibratedUnitSelector):
    """Keeps the units whose removal would change the loss most, by the gradients of gates at 1.

    A gate g_u that multiplies all that a unit gives has at 1 the gradient dL/dg_u = sum over tokens of a_u * dL/da_u,
    which is what the loss falls by, to first order, when the unit is gone. The score is the mean over batches of its
    square (Molchanov et al., arXiv 1906.10771, section 3) or of its absolute value. The gates sit where the down
    projection reads an MLP channel and the attention's output projection a head; a hidden dimension has one gate on
    everything that is written to it, embeddings included. Padding tokens weigh nothing.

    A loss that is divided, for gradient accumulation or otherwise, scales all scores alike; what a loss scale (fp16)
    multiplies is taken out, and batches that overflow under it are left out.

    Args:
        heads: query heads a layer that stay, a count or a ratio; None keeps all of each group that stays.
        kv_groups: key-value heads a layer that stay, each with its query heads.
        channels: MLP channels a layer that stay.
        hidden: hidden dimensions that stay.
        multiple_of: ratios of channels and hidden dimensions are rounded to the nearest multiple of this.
        accumulate: the mean over batches of the "squared" or of the "absolute" gradients.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes.
    """

    def __init__(
        self,
        heads: Keep = None,
        kv_groups: Keep = None,
        channels: Keep = None,
        hidden: Keep = None,
        multiple_of: int = 64,
        accumulate: Accumulate = "squared",
        start: Steps = 0,
        stop: Steps = 16,
    ) -> None:
        super().__init__(heads, kv_groups, channels, hidden, multiple_of, start, stop)
        self.accumulate: Accumulate = accumulate
        self._gates: dict[Unit, Tensor] = {}

    def check_settings(self) -> None:
        super().check_settings()
        check_choice(self, "accumulate", self.accumulate, get_args(Accumulate))

    def attach(self, unit: Unit) -> Tensor:
        anatomy = self.pipeline.anatomy
        layers = 1 if unit == "hidden" else anatomy.num_layers
        gates = torch.ones(layers, anatomy.shape.count(unit), device=anatomy.lm.device, requires_grad=True)
        for site in anatomy.sites():
            if unit == "hidden":
                if site.writes_hidden:
                    self._handles.append(change_output(site.module, self._gate(gates, 0)))
            elif site.layer is not None and site.reads(HEADS if unit == "heads" else CHANNELS):
                self._handles.append(change_input(site.module, self._gate(gates, site.layer)))
        self._gates[unit] = gates
        return accumulator(2, *gates.shape, device=gates.device)

    def _gate(self, gates: Tensor, row: int) -> Callable[[Tensor], Tensor]:
        def gated(activation: Tensor) -> Tensor:
            if not self._scored:
                return activation
            weights = self.weights_of_tokens(activation[..., 0].numel(), activation.device)
            return cast(Tensor, _Gate.apply(activation, gates[row], weights))  # type: ignore[no-untyped-call]

        return gated

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A batch is what all ranks have of it, as it is to the optimizer.
        mean = self.pipeline.engine.mean
        gradients = {unit: mean(gates.grad) for unit, gates in self._gates.items() if gates.grad is not None}
        if not gradients:
            return
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
        scale = self._loss_scale(finite)
        for unit, gradient in gradients.items():
            sums = self._sums[unit]
            change = torch.where(finite, gradient / scale, 0).to(sums.dtype)
            change = change.square() if self.accumulate == "squared" else change.abs()
            sums += torch.stack([finite.to(sums.dtype).expand_as(change), change])
            self._gates[unit].grad = None

    def _loss_scale(self, finite: Tensor) -> Tensor:
        """What the loss was multiplied by; while no optimizer steps, this lowers it after an overflow."""
        scaler = self.pipeline.engine.scaler
        one = torch.ones((), device=finite.device)
        if scaler is None or not scaler.is_enabled():
            return one
        scale: Tensor = scaler.scale(one)
        if self.pipeline.weights.held:
            scaler.update(torch.where(finite, scale, scale * scaler.get_backoff_factor()))
        return scale

    def score(self, unit: Unit, sums: Tensor) -> Tensor:
        scores = sums[1] / sums[0].clamp(min=1)
        return scores[0] if unit == "hidden" else scores

    @property
    def settings(self) -> dict[str, Any]:
        return {"accumulate": self.accumulate, "passes": self._passes}

    def detach(self) -> None:
        super().detach()
        self._gates = {}


class _Gate(torch.autograd.Function):
    """A gate at 1, that is the identity, and the gradient that the gate would have, in float32.

    Args of `apply`: activations [..., m], gates [n], and what each token counts for [N].
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gates: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(activation, weights)
        ctx.units = len(gates)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        activation, weights = ctx.saved_tensors
        (gradient,) = gradients
        products = (activation.float() * gradient.float()).flatten(0, -2) * weights.unsqueeze(1)
        return gradient, torch.unflatten(products.sum(0), 0, (ctx.units, -1)).sum(-1), None
