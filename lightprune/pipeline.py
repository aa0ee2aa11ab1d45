"""The pipeline: what binds the pruning callbacks of one trainer to its module, its model and its strategy.

Data flows one way: selectors decide a plan, regularizers empty what it removes, the cut executes it, recovery trains
what is left. Each of these is a `Part`, a callback that only says what it should be after a number of optimizer steps.
The hooks of the first move all of them, in the order of their stages, so the order of `trainer.callbacks` does not
matter. How they act inside of an optimizer step that is not theirs: `lightprune.doors`.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightprune import run_checks, strategies
from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.attach_checks import check_attached, check_hooks
from lightprune.cycle import Cycle, cycles_of, place_cuts, unfinished
from lightprune.doors import Doors, HeldWeights
from lightprune.host import callbacks_of, find_causal_lm, is_training_pass, log_metrics, shadow_method
from lightprune.partitioned import whole_construction
from lightprune.plan import PruningPlan
from lightprune.stages import Phase, Stage, Status, parts_last
from lightprune.steps import resolve_steps

if TYPE_CHECKING:
    from lightprune.cut import StructuredCut
    from lightprune.regularizers.base import Regularizer
    from lightprune.selectors.base import Selector

__all__ = ["Part", "Phase", "Pipeline", "Stage", "Status"]


class Part(Callback, ABC):
    """A pruning callback. Subclasses say what they do; the pipeline says when.

    Steps are optimizer steps, `trainer.global_step`: gradient accumulation does not change them.
    """

    stage: ClassVar[Stage]
    step_settings: ClassVar[tuple[str, ...]] = ()  # the settings that may be shares of the run (`lightprune.steps`)
    alters: ClassVar[bool] = False  # whether this changes what the model computes before the cut
    folds: ClassVar[bool] = False  # whether `fold` writes anything into the weights
    needs_training: ClassVar[bool] = False  # whether this makes no sense without an optimizer
    hooks_layers: ClassVar[bool] = False  # whether this has hooks on decoder layers that need gradients, or to run once
    pipeline: "Pipeline"
    shaped_by: "Pipeline | None" = None  # of the last fit, or evaluation of a checkpoint, that this has a state from

    @property
    def begins(self) -> int:
        """The optimizer step at which this part begins to matter; orders the parts of one stage."""
        return 0

    @property
    def state_key(self) -> str:
        """A run may have several parts of a class, if they begin at different steps."""
        return self._generate_state_key(begins=self.begins)

    @property
    def cycle(self) -> Cycle:
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

    def advance(self, step: int) -> None:
        """Become what this part has to be once `step` optimizer steps are done. Called often; must be idempotent."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of the batch whose forward pass has just run, or None."""
        return None

    @property
    def needs_backward(self) -> bool:
        """Whether this acts in backward passes, now or later; of a module's own `loss.backward()` it sees nothing."""
        return type(self).penalty is not Part.penalty and not self.cycle.done

    def end_batch(self) -> None:
        """Bring ranks together after a batch. All of them call this, those that skipped the batch too."""

    def learn(self) -> None:
        """Step what this part optimizes by itself; called once per optimizer step, with gradients in place."""

    def project(self) -> None:
        """Change weights after an optimizer step that moved them; called once for each."""

    def fold(self) -> None:
        """Write into the weights what this part's hooks do; called just before a cut takes them off."""

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

    def status(self) -> Status:
        """The numbers that matter in this part's phase, for the progress bar."""
        return {}

    def detach(self) -> None:
        """Take every hook off the model."""

    def finish(self) -> None:
        """Leave an ordinary model: training is over, and what it became is written next. Called often; idempotent."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        Pipeline.open(trainer, pl_module, stage)

    @property
    def _is_first(self) -> bool:
        return self is self.pipeline.parts[0]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_first:
            self.pipeline.check_run()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_first:
            self.pipeline.begin_batch()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self.pipeline.weights.held and self.pipeline.engine.stepping:
            self.learn()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._is_first:
            self.pipeline.end_batch()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_first:
            self.pipeline.evaluate()

    on_test_start = on_predict_start = on_validation_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_first:
            self.pipeline.finish()

    on_fit_end = on_train_end  # where a resume finds training over, this is the first hook that is called

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close(trainer)

    @staticmethod
    def _close(trainer: L.Trainer) -> None:
        if (pipeline := Pipeline.of(trainer)) is not None:  # an exception may come before any part was set up
            pipeline.close()


class Pipeline:
    """The parts of one trainer, in the order of their stages, and the model that they work on."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.module = module
        self.fitting = stage == "fit"
        self.parts = _parts_of(trainer)
        for part in self.parts:
            part.resolve_steps(trainer.max_steps)
        place_cuts(self.cuts, self.selectors, self.regularizers)
        for part in self.parts:
            part.check_settings()
        self.parts.sort(key=lambda part: (part.stage, part.begins))
        self.cycles = cycles_of(self.selectors, self.cuts)
        self.engine = strategies.engine_of(trainer)
        self.anatomy: Anatomy
        self._restored: frozenset[str] = frozenset()  # the states of parts that come from a checkpoint
        self._evaluated: int | None = None  # the step of the checkpoint that is evaluated outside a fit
        self._ended = False
        self._unwrap: list[Callable[[], None]] = []
        self.weights = HeldWeights(module)
        self._doors = Doors(self.engine, self.parts, self.weights)

    @classmethod
    def of(cls, trainer: L.Trainer) -> "Pipeline | None":
        """The trainer's pipeline; None if it has no pruning callbacks or has not set them up yet."""
        found = [part.pipeline for part in _parts_of(trainer) if hasattr(part, "pipeline")]
        return next((pipeline for pipeline in found if pipeline.trainer is trainer), None)

    @classmethod
    def open(cls, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Bind the trainer's parts to its module, unless another part has done so already."""
        pipeline = cls.of(trainer)
        if pipeline is not None and pipeline._unwrap:
            return
        pipeline = cls(trainer, module, stage)
        for part in pipeline.parts:
            part.pipeline = pipeline
        # A cut validates, and whoever then saves a checkpoint saves what the other callbacks made of this step too.
        trainer.callbacks = parts_last(callbacks_of(trainer), pipeline.parts)  # type: ignore[attr-defined]
        pipeline._wrap_all()

    # What the parts and the reports ask.

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM inside the module."""
        return self.anatomy.lm

    @property
    def step(self) -> int:
        """Optimizer steps done; outside a fit, those of the checkpoint that is evaluated."""
        return self.trainer.global_step if self._evaluated is None else self._evaluated

    @property
    def resumed(self) -> bool:
        """Whether parts have their states from a checkpoint."""
        return bool(self._restored)

    @property
    def training(self) -> bool:
        """Whether a forward pass now is one that trains."""
        return is_training_pass(self.trainer)

    @property
    def selectors(self) -> "list[Selector]":
        """The parts that decide the plan."""
        return [cast("Selector", part) for part in self.parts if part.stage is Stage.SELECT]

    @property
    def regularizers(self) -> "list[Regularizer]":
        """The parts that empty what the plan removes."""
        return [cast("Regularizer", part) for part in self.parts if part.stage is Stage.REGULARIZE]

    @property
    def cuts(self) -> "list[StructuredCut]":
        """The parts that execute plans, in the order of their steps."""
        return [cast("StructuredCut", part) for part in self.parts if part.stage is Stage.CUT]

    @property
    def cut(self) -> "StructuredCut | None":
        """The last of the cuts, from which recovery counts, if there is any."""
        return self.cuts[-1] if self.cuts else None

    @property
    def cycle(self) -> Cycle:
        """The cycle that the run is in; after the last cut, the last one."""
        return next((cycle for cycle in self.cycles if not cycle.done), self.cycles[-1])

    def cycle_of(self, part: Part) -> Cycle:
        """The cycle that a selector or a cut belongs to; for other parts, the one that the run is in."""
        return next((c for c in self.cycles if part is c.cut or any(part is s for s in c.selectors)), self.cycle)

    @property
    def plan(self) -> PruningPlan | None:
        """What is to be cut next, or after the last cut what was cut there; None until it is decided."""
        return self.cycle.plan

    @property
    def executed(self) -> PruningPlan | None:
        """What all cuts so far have done, as one plan for the model that the run began with."""
        plans = [cut.plan for cut in self.cuts if cut.plan is not None]
        return reduce(PruningPlan.then, plans) if plans else None

    @property
    def phase(self) -> Phase:
        """Where the run stands: selecting, transferring knowledge out of what goes, or recovering from the last cut."""
        cycle = self.cycle
        if not self.selectors:
            return "train"
        if cycle.done or (cycle.index and self.step < min(selector.start for selector in cycle.selectors)):
            return "recover"
        return "select" if cycle.plan is None else "transfer"

    def status(self) -> Status:
        """The numbers that matter now, of all parts."""
        return {name: value for part in self.parts for name, value in part.status().items()}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write metrics to the trainer's loggers at the current step of a fit."""
        if self.fitting:
            log_metrics(self.trainer, metrics)

    # What the trainer drives.

    def begin_batch(self) -> None:
        """A batch is about to train."""
        self._doors.begin_batch()
        self.advance()

    def end_batch(self) -> None:
        """A batch has trained, or was skipped."""
        self._doors.end_batch()
        for part in self.parts:
            part.end_batch()
        self.advance()

    def advance(self) -> None:
        """Move every part to where it has to be after the optimizer steps done so far."""
        for part in self.parts:
            part.advance(self.step)

    def check_run(self) -> None:
        """Refuse what only shows once data and optimizers are there, and still before the first step."""
        run_checks.check_run(self)
        check_hooks(self)
        for part in self.parts:
            part.shaped_by = self

    def evaluate(self) -> None:
        """Where a checkpoint is evaluated outside a fit, let the model compute what it did as that was saved."""
        if self._evaluated is None:
            return
        undecided = [selector for selector in self.selectors if selector.plan is None and selector.stop <= self.step]
        with torch.inference_mode(False):  # a fit may go on with what is made here
            for part in self.parts:
                if part.alters and part.state_key in self._restored and part not in undecided:
                    part.advance(self.step)

    def finish(self) -> None:
        """Let the parts leave an ordinary model. Whoever comes first at the end of training calls it."""
        for part in self.parts:
            part.finish()
        missed = unfinished(self.cycles, self.trainer.global_step) if self.fitting and not self._ended else None
        if missed is not None:
            rank_zero_warn(missed)
        self._ended = True

    def attach(self) -> None:
        """Find the model and check every part against it; called once the module has built its layers."""
        _, lm = find_causal_lm(self.module)
        self.anatomy = anatomy_of(lm)
        self._unwrap += [handle.remove for handle in self._doors.watch(self.anatomy.decoder)]
        if self.fitting:
            check_attached(self)

    def close(self) -> None:
        """Leave the module and the strategy as they were found."""
        for part in self.parts:
            part.detach()
        self.weights.release()
        self.engine.expect_skips(False)
        while self._unwrap:
            self._unwrap.pop()()

    def _wrap_all(self) -> None:
        if self.fitting:
            self.engine.check()
            self.engine.expect_skips(any(part.skips_layers for part in self.parts))
            self.shadow(self.trainer.strategy, self.engine.makes_optimizers, self._make_optimizers)
        self.shadow(self.module, "configure_model", self._configure_model)
        self.shadow(self.trainer.strategy, "load_checkpoint", self._load_checkpoint)
        self._unwrap += self._doors.open()

    def shadow(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Shadow a method on the instance until `close`; `replacement` gets the original first."""
        self._unwrap.append(shadow_method(owner, name, replacement))

    def _configure_model(self, original: Callable[[], None]) -> None:
        original()
        with whole_construction():  # the checks build models of their own
            self.attach()

    def _make_optimizers(self, original: Callable[..., Any], *args: Any) -> Any:
        made = original(*args)
        self.engine.check_made(self.engine.made(made))
        return made

    def _load_checkpoint(
        self, original: Callable[..., dict[str, Any]], checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        run_checks.check_checkpoint(checkpoint_path, self.trainer.strategy.checkpoint_io)
        checkpoint = self.engine.load(original, self._restructure, checkpoint_path, *args, **kwargs)
        if not self.fitting:
            self._evaluated = checkpoint.get("global_step")
            for part in self.parts:
                part.shaped_by = self
        return checkpoint

    def _restructure(self, states: Mapping[str, Any]) -> None:
        run_checks.check_resume(self.parts, states)
        restored = [part for part in self.parts if part.state_key in states]
        self._restored = frozenset(part.state_key for part in restored)
        for part in restored:
            part.restructure(states[part.state_key])
        if self.cut is not None and states.get(self.cut.state_key, {}).get("plan") is not None:
            self.engine.expect_skips(False)


def _parts_of(trainer: L.Trainer) -> list[Part]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Part)]
