"""What selectors of width that score on training batches share: sums over the window, synchronised and resumable."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightprune.anatomy import Unit
from lightprune.integrations.exact_metric import widest
from lightprune.masks.forward_passes import TokenMask
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.width.units import UnitSelector


class CalibratedUnitSelector(UnitSelector):
    """Scores units by sums over the training batches of its window, all in one pass, while the weights stand still.

    The sums are float64 tensors on the model's device; nothing waits for the device before the window closes. Where
    several ranks train, the sums are those of all of their batches.

    Args:
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes.
        counts: those of `UnitSelector`: `heads`, `kv_groups`, `channels`, `hidden`, `multiple_of`, `target`.
    """

    def __init__(self, *, start: Steps = 0, stop: Steps = 16, **counts: Any) -> None:
        super().__init__(start=start, stop=stop, hold_weights=True, **counts)
        self._sums: dict[Unit, Tensor] = {}
        self._passes = 0
        self._scored = False  # whether the current forward pass is one to score
        self._mask = TokenMask()

    @abstractmethod
    def attach(self, unit: Unit) -> Tensor:
        """Watch the units of one structure from now on, and give their sums so far: zeros, counts in the first row."""

    @abstractmethod
    def score(self, unit: Unit, sums: Tensor) -> Tensor:
        """The scores [L, n], for hidden dimensions [d], that the sums of all ranks amount to."""

    def watch(self) -> None:
        decoder = self.pipeline.anatomy.decoder
        before: list[tuple[bool, Tensor | None]] = []

        def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            before[:] = [(self._scored, self._mask.mask)]
            # Asked here and not below: checkpointed layers run without gradients and are still training.
            self._scored = self.pipeline.training
            self._passes += self._scored

        def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # Checkpointed layers run again in the backward pass: what they find then is of the pass that trains.
            if before and not self._scored:
                self._scored, self._mask.mask = before[0]

        self._handles += [
            decoder.register_forward_pre_hook(begin),
            self._mask.watch(decoder),
            decoder.register_forward_hook(end, always_call=True),
        ]
        for unit in self.units:
            nothing = self.attach(unit)
            self._sums[unit] = self._sums.get(unit, nothing).to(nothing.device)

    def scores(self) -> Mapping[Unit, Tensor]:
        totals = {unit: self.pipeline.adapter.sum(sums) for unit, sums in self._sums.items()}
        if not all(sums[0].all() for sums in totals.values()):
            raise self.seen_nothing()
        return {unit: self.score(unit, sums) for unit, sums in totals.items()}

    def choose(self) -> PruningPlan:
        plan = super().choose()
        self._sums = {}
        return plan

    def status(self) -> Status:
        return {"scored": self._passes} if self.open else super().status()

    def weights_of_tokens(self, tokens: int, device: torch.device) -> Tensor:
        """What each of the pass's `tokens`, in the order of the batch, counts for: float32 [N], 0 for padding."""
        mask = self._mask.mask
        if mask is None or mask.numel() != tokens:
            return torch.ones(tokens, device=device)
        return (mask.flatten() != 0).to(device, torch.float32)

    def scores_state(self) -> dict[str, Any]:
        # The mean over ranks: each of them takes it back, and together they have the sum again.
        means = {unit: self.pipeline.adapter.mean(sums) for unit, sums in self._sums.items()}
        return {"sums": means, "passes": self._passes}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self._sums, self._passes = dict(state["sums"]), state["passes"]


def accumulator(*sizes: int, device: torch.device) -> Tensor:
    """Zeros to sum in."""
    return torch.zeros(*sizes, device=device, dtype=widest(device))
