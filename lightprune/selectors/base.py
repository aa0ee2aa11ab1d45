"""What all selectors are: a window of training batches, watched, and at its end a plan."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightprune.anatomy import Shape, Structure
from lightprune.errors import ConfigError, check_number
from lightprune.masks.gates import Handle, remove_all
from lightprune.pipeline import DecidingPart, PruningCallback, Status
from lightprune.pipeline.part import smaller
from lightprune.pipeline.schedule import expected_shapes
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.target import Target


class Selector(PruningCallback, DecidingPart):
    """Decides what of some structures stays, from the training batches of a window of optimizer steps.

    Args:
        start: the optimizer step at which the window opens, or a share of the run such as "10%".
        stop: the optimizer step at which it closes and the plan is made, or a share likewise.
        hold_weights: let the module's weights stand still in the window, so that what is scored is one model; the
            window's batches are calibration, and count in the budget all the same.

    Attributes:
        plan: what stays of this selector's structures; None until it is decided.
        budget: what the model must come out within; None where counts say what stays.
        open: whether the window is open now.
        opened: whether it has been, in this fit, in one before, or in the run of a checkpoint.
    """

    step_settings: ClassVar[tuple[str, ...]] = ("start", "stop")
    budget: Target | None = None

    def __init__(self, start: Steps, stop: Steps, hold_weights: bool) -> None:
        vars(self).update(start=start, stop=stop)  # shares until `resolve_steps`
        self.hold_weights = hold_weights
        self.plan = None
        self.opened = False
        self.open = False
        self._handles: list[Handle] = []

    @property
    def begins(self) -> int:
        return self.start

    def watch(self) -> None:
        """Attach to the model: the window opens (again, after a resume). Those without a window never do."""

    @abstractmethod
    def choose(self) -> PruningPlan:
        """The plan, with what was seen as its provenance; it need not be one that can be executed alone."""

    def expected_source(self) -> Shape | None:
        """The model's shape when this decides; None after a cut, since all was checked before it."""
        if any(cycle.done for cycle in self.pipeline.cycles):
            return None
        return expected_shapes(self.pipeline.cycles, self.pipeline.anatomy)[self.cycle.index]

    def left_by_others(self, source: Shape) -> Shape:
        """What the other selectors of this cut leave of a model of shape `source`, where this one has a target.

        Raises:
            ConfigError: another one has a target too.
        """
        shape = source
        for other in self.cycle.selectors:
            if other is self:
                continue
            if isinstance(other, Selector) and other.budget is not None:
                raise ConfigError(
                    f"{type(self).__name__}.target and {type(other).__name__}.target are set for one cut: the whole "
                    "model is to come out within a target, so set it on one of them, and counts on the other."
                )
            shape = smaller(shape, other.target(source))
        return shape

    def check_settings(self) -> None:
        check_number(self, "start", self.start, whole=True, least=0)
        check_number(self, "stop", self.stop, whole=True)

    def check(self) -> None:
        name = type(self).__name__
        if self.needs_batches and self.stop <= self.start:
            raise ConfigError(
                f"{name} opens at step {self.start} and closes at step {self.stop}: set `stop` to a step after `start`."
            )
        for other in self.cycle.selectors:
            if not self.alters and other.alters and max(self.start, other.start) < min(self.stop, other.stop):
                rank_zero_warn(
                    f"{name} scores steps {self.start} to {self.stop}, and {type(other).__name__} changes what the "
                    f"model computes from step {other.start} to {other.stop}: set `start` of the one to `stop` of the "
                    "other, or these are scores of a moving model."
                )

    def advance(self, step: int) -> None:
        if self.plan is not None or step < self.start or self.cycle is not self.pipeline.cycle:
            return
        if not self.open and self.stop > self.start:
            self.open = self.opened = True
            if self.hold_weights:
                self.pipeline.weights.hold()
            self.watch()
        if step >= self.stop or self.settled():
            self._decide()

    @property
    def holding(self) -> bool:
        return self.open and self.hold_weights

    def settled(self) -> bool:
        """Whether the decision can be made before `stop`."""
        return False

    def seen_nothing(self) -> ConfigError:
        """The error for a window that has shown nothing to decide by."""
        return ConfigError(
            f"{type(self).__name__} has seen nothing by step {self.stop}: between its `start` and `stop` it needs "
            "batches that run through the model and have a loss."
        )

    @property
    def needs_backward(self) -> bool:
        acts = self.hold_weights or super().needs_backward  # held weights have no gradients for `loss.backward()`
        return acts and self.needs_batches and self.plan is None

    def detach(self) -> None:
        self.open = False
        remove_all(self._handles)

    def _decide(self) -> None:
        plan = self.choose()
        self.detach()
        if not any(other.holding for other in self.pipeline.selectors):
            self.pipeline.weights.release()
        made_by = {"selector": type(self).__name__, "step": self.pipeline.step}
        decided = replace(plan, provenance={**made_by, **plan.provenance})
        # All ranks have seen the same, but for rounding, and rounding must not decide.
        self.plan = PruningPlan.from_dict(self.pipeline.adapter.broadcast(decided.to_dict()))

    def state_dict(self) -> dict[str, Any]:
        return {"plan": None if self.plan is None else self.plan.to_dict(), **self.scores_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plan = None if state_dict["plan"] is None else PruningPlan.from_dict(state_dict["plan"])
        self.opened = True
        self.load_scores_state(state_dict)

    def scores_state(self) -> dict[str, Any]:
        """What a resume in the middle of the window needs: tensors and plain values."""
        return {}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `scores_state` gave."""


class LayerSelector(Selector):
    """Decides which layers go.

    Args:
        drop: how many layers go; None where `target` says it.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes and the plan is made.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
        hold_weights: let the module's weights stand still in the window.
        target: what the model must come out within; as few layers go as that needs.
    """

    structures = frozenset[Structure]({"layers"})

    def __init__(
        self,
        drop: int | None,
        start: Steps,
        stop: Steps,
        protect_first: int,
        protect_last: int,
        hold_weights: bool,
        target: Target | None = None,
    ) -> None:
        super().__init__(start, stop, hold_weights)
        self.drop = cast(int, drop)  # with a target, None until the model is known; without one, None is refused
        self.budget = target
        self._given = drop
        self.protect_first = protect_first
        self.protect_last = protect_last

    @abstractmethod
    def choose_layers(self) -> tuple[list[int], dict[str, object]]:
        """The layers to drop, and what was seen, for the plan's provenance: plain JSON values."""

    @property
    def protected(self) -> tuple[int, int]:
        return self.protect_first, self.protect_last

    @property
    def candidates(self) -> list[int]:
        """Indices of the layers that are not protected, ascending."""
        return list(range(self.protect_first, self.pipeline.anatomy.num_layers - self.protect_last))

    def check_settings(self) -> None:
        super().check_settings()
        name = type(self).__name__
        if self._given is None and self.budget is None:
            raise ConfigError(f"{name}.drop is None: it must be a whole number, or `target` a budget.")
        if self.budget is None:
            check_number(self, "drop", self.drop, whole=True)
        elif self._given is not None:
            raise ConfigError(f"{name}.drop and {name}.target are both set: leave one of them out.")
        check_number(self, "protect_first", self.protect_first, whole=True, least=0)
        check_number(self, "protect_last", self.protect_last, whole=True, least=0)

    def target(self, source: Shape) -> Shape:
        name, layers = type(self).__name__, source.layers
        available = max(layers - self.protect_first - self.protect_last, 0)
        most = min(available, layers - 1)
        if self.budget is not None:
            self.drop = self._needed(self.budget, source)
        there = f"{name}.drop is {self.drop}: the model has {layers} layers, {layers - available} of them protected"
        if most == 0:
            instead = "protect fewer layers" if layers > 1 else f"leave {name} out of trainer.callbacks"
            raise ConfigError(f"{there}, so none can go; {instead}.")
        if not 1 <= self.drop <= most:
            if self.budget is not None:
                raise ConfigError(
                    f"{name}.target asks for {self.drop} layers to go: the model has {layers}, and {most} may go; "
                    f"raise the target{', or protect fewer layers' if available < layers else ''}."
                )
            raise ConfigError(
                f"{there}, so `drop` must be from 1 to {most}; change it"
                f"{', or protect fewer layers' if available < layers else ''}."
            )
        return replace(source, layers=layers - self.drop)

    def _needed(self, target: Target, source: Shape) -> int:
        """How many layers must go for the model to be within a target."""
        name, others = type(self).__name__, self.left_by_others(source)
        drop = source.layers - target.shape(name, self.pipeline.anatomy, source, others, "layers", 1).layers
        if drop == 0:
            raise ConfigError(f"{name}.target keeps all layers: the model is within it already; lower it.")
        return drop

    def choose(self) -> PruningPlan:
        dropped, seen = self.choose_layers()
        return PruningPlan.dropping(self.pipeline.anatomy, dropped, **seen)

    def status(self) -> Status:
        return {} if self.plan is None else {"dropped": len(self.plan.dropped_layers)}


def lowest(scores: Tensor, candidates: Sequence[int], count: int) -> list[int]:
    """The `count` of `candidates` with the lowest `scores` [n]; ties go to the earlier one."""
    order = torch.argsort(scores[list(candidates)], stable=True)
    return [candidates[position] for position in order[:count].tolist()]
