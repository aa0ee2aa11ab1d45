"""What a part of the pipeline is, what it belongs to, and what it may see.

Data flows one way: selectors decide a plan, regularizers empty what it removes, the cut executes it, recovery trains
what is left. Each of these is a `Part`, a callback that only says what it should be after a number of optimizer steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, Shape, Structure
from lightprune.errors import ConfigError
from lightprune.pipeline.held_weights import HeldWeights
from lightprune.pipeline.stages import Stage, Status
from lightprune.pipeline.steps import resolve_steps
from lightprune.plan import PruningPlan
from lightprune.strategies import StrategyAdapter


class PipelineView(Protocol):
    """What a part may see of the pipeline that it belongs to."""

    trainer: L.Trainer
    module: L.LightningModule
    anatomy: Anatomy
    adapter: StrategyAdapter
    weights: HeldWeights
    fitting: bool
    cycles: "list[Cycle]"

    @property
    def parts(self) -> "Sequence[Part]":
        """All parts, in the order of their stages."""

    @property
    def selectors(self) -> "list[DecidingPart]":
        """The parts that decide the plan."""

    @property
    def cuts(self) -> "list[CuttingPart]":
        """The parts that execute plans, in the order of their steps."""

    @property
    def cut(self) -> "CuttingPart | None":
        """The last of the cuts."""

    @property
    def cycle(self) -> "Cycle":
        """The cycle that the run is in."""

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM inside the module."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def training(self) -> bool:
        """Whether a forward pass now is one that trains."""

    @property
    def resumed(self) -> bool:
        """Whether parts have their states from a checkpoint."""

    @property
    def executed(self) -> PruningPlan | None:
        """What all cuts so far have done."""

    def cycle_of(self, part: "Part") -> "Cycle":
        """The cycle that a part belongs to."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write metrics to the trainer's loggers."""

    def shadow(self, owner: object, name: str, replacement: Callable[..., object]) -> None:
        """Shadow a method on an instance until the pipeline closes."""


class Part(Callback, ABC):
    """A pruning callback. Subclasses say what they do; the pipeline says when.

    Steps are optimizer steps, `trainer.global_step`: gradient accumulation does not change them.

    Attributes:
        stage: its place in the order in which data flows.
        step_settings: the settings that may be shares of the run (`lightprune.pipeline.steps`).
        alters: whether this changes what the model computes before the cut.
        folds: whether `fold` writes anything into the weights.
        loss_share: what the module's own loss is multiplied by in a step, now; a penalty stands for the rest.
        needs_training: whether this makes no sense without an optimizer.
        rotate: whether this may write the model in another basis of its hidden dimensions.
        hooks_layers: whether this has hooks on decoder layers that need gradients, or must run once.
        pipeline: what it belongs to, once it is set up.
        shaped_by: the pipeline of the last fit, or evaluation of a checkpoint, that this has a state from.
    """

    stage: ClassVar[Stage]
    step_settings: ClassVar[tuple[str, ...]] = ()
    alters: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    loss_share: float = 1.0
    needs_training: ClassVar[bool] = False
    hooks_layers: ClassVar[bool] = False
    rotate: bool = False
    pipeline: PipelineView
    shaped_by: PipelineView | None = None

    @property
    def begins(self) -> int:
        """The optimizer step at which this part begins to matter; orders the parts of one stage."""
        return 0

    @property
    def state_key(self) -> str:
        """A run may have several parts of a class, if they begin at different steps."""
        return f"{type(self).__qualname__}{{'begins': {self.begins!r}}}"

    @property
    def cycle(self) -> "Cycle":
        """The cycle of select, regularize and cut that this part belongs to: by default the one that the run is in."""
        return self.pipeline.cycle_of(self)

    def resolve_steps(self, max_steps: int) -> None:
        """Turn settings that are shares of the run into optimizer steps.

        Args:
            max_steps: `trainer.max_steps`.

        Raises:
            ConfigError: a setting is no share, or the run has no fixed length.
        """
        resolve_steps(self, self.step_settings, max_steps)

    def check_settings(self) -> None:
        """Refuse, with a ConfigError, values that no run could have; called before anything compares them."""

    def check(self) -> None:
        """Refuse, with a ConfigError, settings that cannot work; the model is there, nothing is trained yet."""

    def built(self) -> None:
        """Look at the model as the module has built it, before any checkpoint is loaded; called in a fit."""

    def advance(self, step: int) -> None:
        """Bring this part to its state after `step` optimizer steps. Called often; must be idempotent."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of the batch whose forward pass has just run, or None."""
        return None

    @property
    def needs_backward(self) -> bool:
        """Whether this acts in backward passes, now or later; of a module's own `loss.backward()` it sees nothing."""
        return type(self).penalty is not Part.penalty and not self.cycle.done

    def end_batch(self) -> None:
        """Bring ranks together after a batch. All of them call this, those that skipped the batch too."""

    def optimizer_step(self) -> None:
        """Step what this part optimizes by itself; called once per optimizer step, with gradients in place."""

    def project(self) -> None:
        """Change weights after an optimizer step that moved them; called once for each."""

    def fold(self) -> None:
        """Write into the weights what this part's hooks do; called just before a cut takes them off."""

    def before_cut(self, plan: PruningPlan) -> None:
        """Change the weights of the dense model that `plan` is about to be executed on; no hook is on it."""

    def restructure(self, state: Mapping[str, Any]) -> None:
        """Give the model the shape that it had when `state`, this part's, was saved; its weights load next."""

    @property
    def skips_layers(self) -> bool:
        """Whether a step in which weights move may leave whole layers out of the forward pass."""
        return False

    @property
    def sparsity(self) -> float:
        """The share of the model's parameters that this part's masks are expected to remove now."""
        return 0.0

    @property
    def target_sparsity(self) -> float:
        """The share that they will remove in the end."""
        return 0.0

    @property
    def ends(self) -> int | None:
        """The step that a cut without an `at` has to wait for, 0 for none; None where this itself ends at the cut."""
        return 0

    def windows(self) -> list[tuple[int, int | None]]:
        """The optimizer steps from which and to which this acts; None is the end of the run, or not known."""
        cut = self.pipeline.cut
        return [] if cut is None else [(cut.at, None)]

    def status(self) -> Status:
        """The numbers that matter in this part's phase, for the progress bar."""
        return {}

    def detach(self) -> None:
        """Take every hook off the model."""

    def finish(self) -> None:
        """Leave an ordinary model: training is over, and the model is written next. Must be idempotent."""


class DecidingPart(Part):
    """A part that decides what of some structures stays.

    Attributes:
        start: the optimizer step from which on it looks.
        stop: the optimizer step by which it has decided.
        plan: what stays of its structures; None until it is decided.
        opened: whether it has begun to look, in this fit, in one before, or in the run of a checkpoint.
        needs_batches: whether it looks at training batches.
    """

    stage = Stage.SELECT
    needs_batches: ClassVar[bool] = True
    start: int
    stop: int
    plan: PruningPlan | None
    opened: bool

    @property
    @abstractmethod
    def structures(self) -> frozenset[Structure]:
        """What this part decides about."""

    @abstractmethod
    def target(self, source: Shape) -> Shape:
        """The counts that a model of shape `source` has once this part's plan is executed.

        Raises:
            ConfigError: the settings do not fit such a model.
        """

    @property
    def ends(self) -> int | None:
        return self.stop

    def windows(self) -> list[tuple[int, int | None]]:
        return [(self.start, self.stop)]

    @property
    def protected(self) -> tuple[int, int]:
        """How many of the first and of the last layers cannot go, whatever is decided."""
        return 0, 0

    @property
    def holding(self) -> bool:
        """Whether the module's weights have to stand still for this part now."""
        return False

    def foresee(self) -> PruningPlan | None:
        """The plan, if it can be known without training; asked only of those that decide about layers."""
        return self.plan


class CuttingPart(Part):
    """A part that executes the plan.

    Attributes:
        at: the optimizer step after which it does.
        plan: what it has done; None until then.
        step: when it did.
        metrics: what validation logged "before" and "after".
        parameters: parameters of the LM "before" and "after".
    """

    stage = Stage.CUT
    at: int
    plan: PruningPlan | None
    step: int | None
    metrics: dict[str, dict[str, float]]
    parameters: dict[str, int]

    @property
    def done(self) -> bool:
        """Whether the model is cut."""
        return self.plan is not None

    def windows(self) -> list[tuple[int, int | None]]:
        return [(self.at, self.at)]


@dataclass(eq=False)
class Cycle:
    """One pass of select, regularize, cut.

    Attributes:
        index: its place in the run, from 0.
        selectors: who decides the plan, each about structures of its own.
        cut: who executes it; None in a run that only selects.
    """

    index: int
    cut: "CuttingPart | None"
    selectors: "list[DecidingPart]" = field(default_factory=list)
    _merged: tuple[list[PruningPlan], PruningPlan] | None = None

    @property
    def plan(self) -> PruningPlan | None:
        """What the selectors decided together; None until the last of them has."""
        plans = [selector.plan for selector in self.selectors if selector.plan is not None]
        if not plans or len(plans) < len(self.selectors):
            return None
        if self._merged is None or any(new is not old for new, old in zip(plans, self._merged[0], strict=True)):
            merged = plans[0]
            for other in plans[1:]:
                merged = merged.merged(other)
            self._merged = plans, merged
        return self._merged[1]

    @property
    def selected_by(self) -> int:
        """The optimizer step by which the plan is decided."""
        return max((selector.stop for selector in self.selectors), default=0)

    @property
    def done(self) -> bool:
        """Whether its cut is made."""
        return self.cut is not None and self.cut.done

    def target(self, source: Shape) -> Shape:
        """The counts that this cycle leaves of a model of shape `source`.

        Raises:
            ConfigError: two selectors decide about the same, or the settings of one do not fit such a model.
        """
        claimed: dict[str, DecidingPart] = {}
        shape = source
        for selector in self.selectors:
            for structure in selector.structures:
                rival = claimed.setdefault(structure, selector)
                if rival is not selector:
                    raise ConfigError(
                        f"{type(rival).__name__} and {type(selector).__name__} both select {structure}: "
                        "leave one of them in trainer.callbacks, or let the second one start after the first one's "
                        "cut, with a cut of its own."
                    )
            shape = smaller(shape, selector.target(source))
        return shape


def smaller(left: Shape, right: Shape) -> Shape:
    """What two plans for one model leave together: of every count, the smaller one."""
    return Shape(**{name: min(count, getattr(right, name)) for name, count in vars(left).items()})
