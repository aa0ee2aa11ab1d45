"""What all regularizers are: a window of optimizer steps in which the units that the plan removes are emptied."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, cast

from lightprune.anatomy import STRUCTURES, Structure
from lightprune.errors import ConfigError, check_number
from lightprune.masks.gates import Handle, remove_all
from lightprune.pipeline import Cycle, PruningCallback, Stage
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan

Order = Literal["joint", "first_to_last", "last_to_first"]
Ramp = Literal["constant", "linear"]


class Regularizer(PruningCallback):
    """Empties what the plan removes, between the selection and the cut.

    Args:
        start: the optimizer step at which it begins; None as soon as the plan is decided.
        stop: the optimizer step at which its ramp is complete; None is the cut's `at`. It stays complete until the cut.
            Both may be shares of the run, such as "50%" (`lightprune.pipeline.steps`).
            Without `start` and `stop` a regularizer acts before every cut of the run.
    """

    stage = Stage.REGULARIZE
    step_settings = ("start", "stop")
    start: int | None
    stop: int | None
    needs_training = True
    acts_on: ClassVar[frozenset[Structure]] = frozenset(STRUCTURES)

    def __init__(self, start: Steps | None, stop: Steps | None) -> None:
        vars(self).update(start=start, stop=stop)  # shares until `resolve_steps`
        self._began: dict[int, int] = {}  # by cycle
        self._attached = False
        self._handles: list[Handle] = []

    @abstractmethod
    def watch(self, plan: PruningPlan) -> None:
        """Attach to what the plan removes."""

    @abstractmethod
    def apply(self, elapsed: float) -> None:
        """Prepare for the next step, when the share `elapsed` of the window, in (0, 1], is over."""

    @property
    def begins(self) -> int:
        return self.start or 0

    @property
    def ends(self) -> int | None:
        return self.stop

    def windows(self) -> list[tuple[int, int | None]]:
        return [self.window(cycle) for cycle in self.cycles()]

    def check_settings(self) -> None:
        check_number(self, "start", self.start, whole=True, least=0, optional=True)
        check_number(self, "stop", self.stop, whole=True, optional=True)

    def check(self) -> None:
        name, cycles = type(self).__name__, self.cycles()
        if not any(cycle.selectors for cycle in cycles):
            raise ConfigError(f"{name} has no plan to work on: add a selector to trainer.callbacks.")
        decided = {s for cycle in cycles for selector in cycle.selectors for s in selector.structures}
        if not decided & self.acts_on:
            raise ConfigError(
                f"{name} acts on {_listed(self.acts_on)}, and its selectors decide about {_listed(decided)}: leave it "
                f"out of trainer.callbacks, or add a selector that decides about {_listed(self.acts_on)}."
            )
        for cycle in cycles:
            start, end = self.window(cycle)
            if end is None:
                raise ConfigError(f"{name}.stop is not set and there is no cut: set `stop`, or add a StructuredCut.")
            earliest = cycle.selected_by
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
            if cycle.cut is not None and end > cycle.cut.at:
                raise ConfigError(
                    f"{name}.stop is {end}, after the cut at {cycle.cut.at}: set it to at most {cycle.cut.at}."
                )

    def advance(self, step: int) -> None:
        cycle = self.pipeline.cycle
        plan = cycle.plan
        if plan is None or cycle.done or cycle not in self.cycles() or step < (self.start or 0):
            return
        began = self._began.setdefault(cycle.index, step)
        if not self._attached:
            self._attached = True
            self.watch(plan)
        _, end = self.window(cycle)
        assert end is not None
        # A batch of several steps may have passed the whole window.
        self.apply(min((step + 1 - began) / (end - began), 1.0) if began < end else 1.0)

    def detach(self) -> None:
        self._attached = False
        remove_all(self._handles)

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began = state_dict["began"]

    def cycles(self) -> list[Cycle]:
        """The cycles in which this acts: the one that its `start` or `stop` lies in; all of them if neither is set."""
        cycles = self.pipeline.cycles
        if self.start is None and self.stop is None:
            return cycles
        step = self.start if self.start is not None else cast(int, self.stop) - 1
        return [next((c for c in cycles if c.cut is None or step < c.cut.at), cycles[-1])]

    @property
    def removes_layers(self) -> bool:
        """Whether layers go in any of these cycles."""
        return any("layers" in selector.structures for cycle in self.cycles() for selector in cycle.selectors)

    def window(self, cycle: Cycle) -> tuple[int, int | None]:
        """The optimizer steps at which this begins and is complete, as the settings tell them."""
        start = cycle.selected_by if self.start is None else self.start
        return start, self.stop if self.stop is not None or cycle.cut is None else cycle.cut.at


def _listed(structures: Iterable[Structure]) -> str:
    return " or ".join(sorted(structures, key=STRUCTURES.index)) or "nothing"


def ramps(layers: list[int], elapsed: float, order: Order) -> dict[int, float]:
    """How far each layer's ramp is when the share `elapsed` of the window, in (0, 1], is over.

    Jointly, every ramp takes the whole window; one after another, the k-th of n layers ramps in [k/n, (k+1)/n].
    """
    if order == "joint":
        return dict.fromkeys(layers, elapsed)
    turns = sorted(layers, reverse=order == "last_to_first")
    progress = {layer: min(elapsed * len(turns) - turn, 1.0) for turn, layer in enumerate(turns)}
    return {layer: share for layer, share in progress.items() if share > 0}
