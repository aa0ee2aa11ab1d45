"""Taylor: units by what the loss would change, to first order, if they were gone."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.anatomy.axes import CHANNELS, HEADS
from lightprune.errors import check_choice
from lightprune.masks.gates import change_input, change_output
from lightprune.selectors.width.calibration import CalibratedUnitSelector, accumulator

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
        accumulate: the mean over batches of the "squared" or of the "absolute" gradients.
        settings: those of `UnitSelector`: `heads`, `kv_groups`, `channels`, `hidden`, `multiple_of`, `target`, `start`,
            `stop`.
    """

    def __init__(self, *, accumulate: Accumulate = "squared", **settings: Any) -> None:
        super().__init__(**settings)
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

    def end_batch(self) -> None:
        if not self._gates:  # the window is not open
            return
        gradients, seen = self._mean_gradients()
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
        counts, scale = seen & finite, self._loss_scale(finite)
        for unit, gradient in gradients.items():
            sums = self._sums[unit]
            change = torch.where(counts, gradient / scale, 0).to(sums.dtype)
            change = change.square() if self.accumulate == "squared" else change.abs()
            sums += torch.stack([counts.to(sums.dtype).expand_as(change), change])
            self._gates[unit].grad = None

    def _mean_gradients(self) -> tuple[dict[Unit, Tensor], Tensor]:
        """The gates' gradients in this batch, and whether there are any, without waiting for the device.

        A batch is what all ranks have of it, as it is to the optimizer: their mean, in one reduction that every rank
        takes part in. One that has skipped the batch counts as zeros.
        """
        pieces = {u: torch.zeros_like(g) if g.grad is None else g.grad for u, g in self._gates.items()}
        seen = any(gates.grad is not None for gates in self._gates.values())
        flat = torch.cat([piece.flatten() for piece in pieces.values()])
        mean = self.pipeline.adapter.mean(torch.cat([flat, flat.new_full((1,), seen)]))
        parts = torch.split(mean[:-1], [piece.numel() for piece in pieces.values()])
        return {unit: part.view_as(pieces[unit]) for unit, part in zip(pieces, parts, strict=True)}, mean[-1] > 0

    def _loss_scale(self, finite: Tensor) -> Tensor:
        """What the loss was multiplied by; while no optimizer steps, this lowers it after an overflow."""
        scaler = self.pipeline.adapter.scaler
        one = torch.ones((), device=finite.device)
        if scaler is None or not scaler.is_enabled():
            return one
        scale: Tensor = scaler.scale(one)
        if self.pipeline.weights.held:
            scaler.update(torch.where(finite, scale, scale * scaler.get_backoff_factor()))
        return scale

    def scores(self) -> Mapping[Unit, Tensor]:
        self.end_batch()  # callbacks that are called before the parts may ask for them
        return super().scores()

    def scores_state(self) -> dict[str, Any]:
        self.end_batch()
        return super().scores_state()

    def score(self, unit: Unit, sums: Tensor) -> Tensor:
        scores = sums[1] / sums[0].clamp(min=1)
        return scores[0] if unit == "hidden" else scores

    @property
    def needs_backward(self) -> bool:
        return self.plan is None

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
