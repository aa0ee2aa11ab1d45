"""Block influence: the score of ShortGPT (arXiv 2403.03853)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightprune.observe import TokenMask, on_output
from lightprune.pipeline import Status
from lightprune.selectors.base import LayerSelector, lowest


class BlockInfluenceSelector(LayerSelector):
    """Drops the layers that turn their input the least: BI_l = 1 - mean over tokens of cos(X_in, X_out).

    Scored once, over all batches of the window (ShortGPT, equation 1; a baseline here).

    Args:
        drop: how many layers go.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
    """

    def __init__(
        self, drop: int, start: int = 0, stop: int = 16, protect_first: int = 0, protect_last: int = 0
    ) -> None:
        super().__init__(drop, start, stop, protect_first, protect_last, hold_weights=True)
        self._sums = torch.empty(0)
        self._batches = torch.empty(0)
        self._tokens = TokenMask()

    def watch(self) -> None:
        layers = self.pipeline.anatomy.layers
        if not len(self._sums):
            self._sums, self._batches = torch.zeros(2, len(layers), dtype=torch.float64)
        self._handles.append(self._tokens.watch(self.pipeline.lm))
        self._handles += [on_output(layer, self._record(index)) for index, layer in enumerate(layers)]

    def _record(self, index: int) -> Any:
        def use(hidden_in: Tensor, hidden_out: Tensor) -> None:
            if not self.pipeline.training:
                return
            cosine = torch.cosine_similarity(hidden_in.detach().float(), hidden_out.detach().float(), dim=-1)
            self._sums[index] += 1 - self._tokens.mean(cosine).item()
            self._batches[index] += 1

        return use

    @property
    def scores(self) -> Tensor:
        """BI_l of every layer [L], from 0 (the layer changes nothing) to 2."""
        return self._sums / self._batches.clamp(min=1)

    def _mean(self) -> tuple[Tensor, Tensor]:
        """The sums and the number of batches, the mean over all ranks; every rank must ask."""
        sums, batches = self.pipeline.engine.mean(torch.stack([self._sums, self._batches]))
        return sums, batches

    def choose_layers(self) -> tuple[list[int], dict[str, Any]]:
        self._sums, self._batches = self._mean()
        self.pipeline.log({f"select/influence/layer_{i:02d}": float(v) for i, v in enumerate(self.scores)})
        return lowest(self.scores, self.candidates, self.drop), {"block_influence": self.scores.tolist()}

    def status(self) -> Status:
        return {"scored": int(self._batches.max())} if self._open else super().status()

    def scores_state(self) -> dict[str, Any]:
        # The mean over ranks: each of them takes it back, and together they have the same scores again.
        sums, batches = self._mean() if len(self._sums) else (self._sums, self._batches)
        return {"sums": sums, "batches": batches}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self._sums, self._batches = state["sums"], state["batches"]
