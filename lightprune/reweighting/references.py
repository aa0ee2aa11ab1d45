"""The reference losses: what each domain's loss is compared with.

Shapes: [D] float64, in nats per token, one entry for each domain; NaN where a loss is not known.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from lightprune.reweighting.history import History
from lightprune.reweighting.robust import Array
from lightprune.reweighting.scaling_law import MIN_POINTS, predicted_loss

POINTS_FROM, FITS_FROM = 0.02, 0.1
"""The shares of the steps from which on points are taken and the law is fitted."""

MAX_POINTS = 64
"""So many a domain keeps for its fits, spread evenly over the run."""


@dataclass(frozen=True)
class Observation:
    """Where the run stands at an update.

    Attributes:
        progress: the share of the steps that are done.
        losses: [D] of the model now.
        tokens: [D] trained so far.
        sparsity: of the model now, in [0, 1).
        final_tokens: [D] that will be trained by the end, if each domain goes on at its rate so far.
        final_sparsity: of the model at the end, in [0, 1).
    """

    progress: float
    losses: Array
    tokens: Array
    sparsity: float
    final_tokens: Array
    final_sparsity: float


class Reference(Protocol):
    """Gives the reference losses [D] at each update, or None while there are none to compare with."""

    def update(self, observation: Observation) -> Array | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class FixedReference:
    """Losses that do not change: the user's, or the source model's own once they are measured.

    Args:
        losses: [D]; None while they are not measured.
    """

    def __init__(self, losses: Array | None = None) -> None:
        self.losses = losses

    def update(self, observation: Observation) -> Array | None:
        return self.losses

    def state_dict(self) -> dict[str, Any]:
        return {"losses": None if self.losses is None else self.losses.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = None if state["losses"] is None else np.array(state["losses"])

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _End:
    """The point that the law is asked about."""

    tokens: list[float]
    sparsity: float


class DynamicReference:
    """Each domain's loss at the end of the run, as its scaling law predicts it (DRPruning, arXiv 2411.14055).

    From 2% of the steps on every update gives a point (tokens, sparsity, loss), and from 10% on, with more than ten
    points, every update begins a fit. The first fit sets the reference, later ones may only lower it. Until then there
    is no reference. A domain whose points allow no fit has the lowest loss that it has shown.

    A fit runs in a thread beside the training and its result is taken at the next update, which waits for it in the
    rare case that it is not ready. So no step depends on how fast a fit is, and a resumed run, which begins a pending
    fit again from the same points, sees the same references.
    """

    def __init__(self) -> None:
        self.losses: Array | None = None
        self._points = History(MAX_POINTS)
        self._end: _End | None = None  # of the pending fit
        self._fit: Future[Array] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scaling-law")

    def update(self, observation: Observation) -> Array | None:
        """Take the last fit's result, add a point, begin the next fit."""
        self._take()
        if observation.progress >= POINTS_FROM:
            losses, tokens = observation.losses.tolist(), observation.tokens.tolist()
            self._points.append({"tokens": tokens, "sparsity": observation.sparsity, "losses": losses})
        if observation.progress >= FITS_FROM and len(self._points) >= MIN_POINTS:
            self._begin(_End(observation.final_tokens.tolist(), observation.final_sparsity))
        return self.losses

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": None if self.losses is None else self.losses.tolist(),
            "points": self._points.state_dict(),
            "pending": None if self._end is None else asdict(self._end),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = None if state["losses"] is None else np.array(state["losses"])
        self._points.load_state_dict(state["points"])
        if state["pending"] is not None:
            self._begin(_End(**state["pending"]))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, end: _End) -> None:
        tokens, sparsity, losses = (np.array(self._points.column(name)) for name in ("tokens", "sparsity", "losses"))
        self._end = end
        self._fit = self._thread.submit(_predicted_losses, tokens, sparsity, losses, end)

    def _take(self) -> None:
        if self._fit is None:
            return
        predicted = self._fit.result()
        self.losses = predicted if self.losses is None else np.fmin(self.losses, predicted)
        self._fit = self._end = None


def _predicted_losses(tokens: Array, sparsity: Array, losses: Array, end: _End) -> Array:
    """[D] from the points' tokens and losses, [n, D] each, and sparsity [n]."""
    predicted = [
        predicted_loss(t, sparsity, y, final_tokens=final, final_sparsity=end.sparsity)
        for t, y, final in zip(tokens.T, losses.T, end.tokens, strict=True)
    ]
    lowest = [float(np.min(y, where=np.isfinite(y), initial=np.inf)) for y in losses.T]
    chosen = [low if loss is None else loss for loss, low in zip(predicted, lowest, strict=True)]
    return np.array([loss if np.isfinite(loss) else np.nan for loss in chosen])
