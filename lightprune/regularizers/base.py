"""What all regularizers are: a window of optimizer steps in which the units that the plan removes are emptied."""

from typing import Any, Literal

from lightprune.errors import ConfigError
from lightprune.gates import Handle
from lightprune.pipeline import Part, Stage

Order = Literal["joint", "first_to_last", "last_to_first"]


class Regularizer(Part):
    """Empties the layers that the plan removes, between the selection and the cut.

    Args:
        start: the optimizer step at which it begins; None as soon as the plan is decided.
        stop: the optimizer step at which its ramp is complete; None is the cut's `at`. It stays complete until the cut.
        order: all chosen layers together, or one after another by depth, each in its own share of the window.
    """

    stage = Stage.REGULARIZE

    def __init__(self, start: int | None, stop: int | None, order: Order) -> None:
        self.start = start
        self.stop = stop
        self.order: Order = order
        self._began: int | None = None
        self._attached = False
        self._handles: list[Handle] = []

    def watch(self, layers: list[int]) -> None:
        """Attach to the layers that the plan removes."""
        raise NotImplementedError

    def apply(self, progress: dict[int, float]) -> None:
        """Set the strength for the next step; `progress` is how far each removed layer's ramp is, in (0, 1].

        A layer whose turn has not come is not in it.
        """
        raise NotImplementedError

    def check(self) -> None:
        name, cut = type(self).__name__, self.pipeline.cut
        if not self.pipeline.selectors:
            raise ConfigError(f"{name} has no plan to work on: add a selector to trainer.callbacks.")
        end = self._end()
        if end is None:
            raise ConfigError(f"{name}.stop is not set and there is no cut: set `stop`, or add a StructuredCut.")
        earliest = max(selector.stop for selector in self.pipeline.selectors)
        start = earliest if self.start is None else self.start
        if start < earliest:
            raise ConfigError(
                f"{name}.start is {start}, before the selection ends at step {earliest}: set it to at "
                f"least {earliest}, or leave it out."
            )
        if start >= end:
            raise ConfigError(
                f"{name} starts at step {start} and stops at step {end}: its window must hold at least one step; "
                "start it earlier, or stop it (or cut) later."
            )
        if cut is not None and end > cut.at:
            raise ConfigError(f"{name}.stop is {end}, after the cut at {cut.at}: set it to at most {cut.at}.")

    def advance(self, step: int) -> None:
        plan, cut = self.pipeline.plan, self.pipeline.cut
        if plan is None or step < (self.start or 0) or (cut is not None and cut.done):
            return
        if self._began is None:
            self._began = step
        if not self._attached:
            self._attached = True
            self.watch(list(plan.dropped_layers))
        end = self._end()
        assert end is not None
        self.apply(self._progress(list(plan.dropped_layers), step, end))

    def detach(self) -> None:
        self._attached = False
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began = state_dict["began"]

    def _end(self) -> int | None:
        cut = self.pipeline.cut
        return self.stop if self.stop is not None else None if cut is None else cut.at

    def _progress(self, layers: list[int], step: int, end: int) -> dict[int, float]:
        assert self._began is not None
        elapsed = (step + 1 - self._began) / (end - self._began)
        return ramps(layers, min(elapsed, 1.0), self.order)


def ramps(layers: list[int], elapsed: float, order: Order) -> dict[int, float]:
    """How far each layer's ramp is when the share `elapsed` of the window, in (0, 1], is over.

    Jointly, every ramp takes the whole window; one after another, the k-th of n layers ramps in [k/n, (k+1)/n].
    """
    if order == "joint":
        return dict.fromkeys(layers, elapsed)
    turns = sorted(layers, reverse=order == "last_to_first")
    progress = {layer: min(elapsed * len(turns) - turn, 1.0) for turn, layer in enumerate(turns)}
    return {layer: share for layer, share in progress.items() if share > 0}
