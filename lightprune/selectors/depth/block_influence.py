"""Block influence: the score of ShortGPT (arXiv 2403.03853)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightprune.integrations.exact_metric import widest
from lightprune.masks.forward_passes import TokenMask, on_output
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.selectors.base import LayerSelector, lowest
from lightprune.selectors.target import Target


class BlockInfluenceSelector(LayerSelector):
    """Drops the layers that turn their input the least: BI_l = 1 - mean over tokens of cos(X_in, X_out).

    Scored once, over all batches of the window (ShortGPT, equation 1; a baseline here).

    Args:
        drop: how many layers go; None where `target` says it.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
        target: what the model must come out within, see `lightprune.Target`; as few layers go as that needs.
    """

    hooks_layers = True

    def __init__(
        self,
        drop: int | None = None,
        start: Steps = 0,
        stop: Steps = 16,
        protect_first: int = 0,
        protect_last: int = 0,
        target: Target | None = None,
    ) -> None:
        super().__init__(drop, start, stop, protect_first, protect_last, hold_weights=True, target=target)
        # Of each layer: the sum of its tokens' influences, and how many tokens these are. Empty until the window opens.
        self._sums = torch.empty(2, 0)
        self._passes = 0
        self._tokens = TokenMask()

    def watch(self) -> None:
        anatomy = self.pipeline.anatomy
        device = anatomy.lm.device
        if not self._sums.numel():
            self._sums = torch.zeros(2, anatomy.num_layers, dtype=widest(device))
        self._sums = self._sums.to(device)
        self._handles.append(self._tokens.watch(anatomy.decoder))
        self._handles += [on_output(layer, self._record(index)) for index, layer in enumerate(anatomy.layers)]

    def _record(self, index: int) -> Callable[[Tensor, Tensor], None]:
        def use(hidden_in: Tensor, hidden_out: Tensor) -> None:
            if not self.pipeline.training:
                return
            cosine = torch.cosine_similarity(hidden_in.detach().float(), hidden_out.detach().float(), dim=-1)
            self._sums[:, index] += torch.stack(self._tokens.total(1 - cosine))
            self._passes += index == 0

        return use

    def choose_layers(self) -> tuple[list[int], dict[str, object]]:
        influences, tokens = self.pipeline.adapter.sum(self._sums)
        if not tokens.any():
            raise self.seen_nothing()
        scores = influences / tokens.clamp(min=1)
        self.pipeline.log({f"select/influence/layer_{i:02d}": float(v) for i, v in enumerate(scores)})
        return lowest(scores, self.candidates, self.drop), {"block_influence": scores.tolist()}

    def status(self) -> Status:
        return {"scored": self._passes} if self.open else super().status()

    def scores_state(self) -> dict[str, Any]:
        # The mean over ranks: each of them takes it back, and together they have the sum again.
        sums = self.pipeline.adapter.mean(self._sums) if self._sums.numel() else self._sums
        return {"sums": sums, "passes": self._passes}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self._sums, self._passes = state["sums"], state["passes"]
