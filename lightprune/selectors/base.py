"""What all selectors are: a window of training batches, watched, and at its end a plan."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightprune.errors import ConfigError
from lightprune.gates import Handle
from lightprune.pipeline import Part, Stage, Status
from lightprune.plan import PruningPlan


class Selector(Part):
    """Decides which layers go, from the training batches of a window of optimizer steps.

    Args:
        drop: how many layers go.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes and the plan is made.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
        hold_weights: let the module's weights stand still in the window, so that what is scored is one model; the
            window's batches are calibration, and count in the budget all the same.

    Attributes:
        plan: None until it is decided.
    """

    stage = Stage.SELECT
    structure: ClassVar[str] = "layers"
    needs_batches: ClassVar[bool] = True

    def __init__(
        self, drop: int, start: int, stop: int, protect_first: int, protect_last: int, hold_weights: bool
    ) -> None:
        self.drop = drop
        self.start = start
        self.stop = stop
        self.protect_first = protect_first
        self.protect_last = protect_last
        self.hold_weights = hold_weights
        self.plan: PruningPlan | None = None
        self._open = False
        self._handles: list[Handle] = []

    @abstractmethod
    def watch(self) -> None:
        """Attach to the model: the window opens (again, after a resume)."""

    @abstractmethod
    def choose(self) -> tuple[list[int], dict[str, Any]]:
        """The layers to drop, and what was seen, for the plan's provenance: plain JSON values."""

    def foresee(self) -> PruningPlan | None:
        """The plan, if it can be known without training."""
        return self.plan

    @property
    def candidates(self) -> list[int]:
        """Indices of the layers that are not protected, ascending."""
        return list(range(self.protect_first, self.pipeline.anatomy.num_layers - self.protect_last))

    def check(self) -> None:
        name = type(self).__name__
        for key in ("start", "protect_first", "protect_last"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{name}.{key} is {getattr(self, key)}: it must be at least 0.")
        available, layers = len(self.candidates), self.pipeline.anatomy.num_layers
        if not 1 <= self.drop <= min(available, layers - 1):
            raise ConfigError(
                f"{name}.drop is {self.drop}: the model has {layers} layers, {layers - available} of them protected, "
                f"so `drop` must be from 1 to {min(available, layers - 1)}; lower it, or protect fewer layers."
            )
        if self.needs_batches and self.stop <= self.start:
            raise ConfigError(
                f"{name} opens at step {self.start} and closes at step {self.stop}: set `stop` to a step after `start`."
            )

    def advance(self, step: int) -> None:
        if self.plan is not None or step < self.start:
            return
        if not self._open and self.stop > self.start:
            self._open = True
            if self.hold_weights:
                self.pipeline.hold_weights()
            self.watch()
        if step >= self.stop or self.settled():
            self._decide()

    def settled(self) -> bool:
        """Whether nothing more is to be learned before `stop`."""
        return False

    def detach(self) -> None:
        self._open = False
        while self._handles:
            self._handles.pop().remove()

    def _decide(self) -> None:
        dropped, seen = self.choose()
        self.detach()
        self.pipeline.release_weights()
        self.plan = PruningPlan.dropping(
            self.pipeline.anatomy, dropped, selector=type(self).__name__, step=self.pipeline.step, **seen
        )

    def status(self) -> Status:
        return {} if self.plan is None else {"dropped": len(self.plan.dropped_layers)}

    def state_dict(self) -> dict[str, Any]:
        return {"plan": None if self.plan is None else self.plan.to_dict(), **self.scores_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plan = None if state_dict["plan"] is None else PruningPlan.from_dict(state_dict["plan"])
        self.load_scores_state(state_dict)

    def scores_state(self) -> dict[str, Any]:
        """What a resume in the middle of the window needs: tensors and plain values."""
        return {}

    def load_scores_state(self, state: dict[str, Any]) -> None:
        """Take back what `scores_state` gave."""


def lowest(scores: Tensor, candidates: list[int], count: int) -> list[int]:
    """The `count` of `candidates` with the lowest `scores` [L]; ties go to the earlier layer."""
    order = torch.argsort(scores[candidates], stable=True)
    return [candidates[position] for position in order[:count].tolist()]
