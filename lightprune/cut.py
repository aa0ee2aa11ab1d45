"""`StructuredCut`: the callback that executes the plan at its step."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from lightning.pytorch.callbacks import (
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightprune.errors import ConfigError, check_number
from lightprune.integrations.checkpoints import no_checkpoints
from lightprune.integrations.lightning import callbacks_of, run_validation
from lightprune.pipeline import CuttingPart, PruningCallback
from lightprune.pipeline.module_checks import check_averages
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model

_WEIGHT_AVERAGING = (WeightAveraging, StochasticWeightAveraging)


class StructuredCut(PruningCallback, CuttingPart):
    """Cuts the model physically inside the running fit; the optimizers, schedulers and `global_step` go on.

    Callbacks that follow validation take these two for any others: an `EarlyStopping` counts them, and a
    `ModelCheckpoint` that monitors a metric compares uncut and cut models by it. No checkpoint is saved in the one
    before the cut, so that the step's checkpoint holds the cut model.

    Args:
        at: the optimizer step after which the model is cut, or a share of the run such as "75%". It may not come before
            the last selector's and the last regularizer's window end, nor after the run. At the very end of the run
            there is no recovery (TRSP). None cuts as soon as these windows end; several cuts each need their `at`.
        validate: run the validation loop just before and just after the cut, if the run has validation data.

    Attributes:
        done: whether the model is cut.
        metrics: what validation logged "before" and "after" the cut.
        parameters: parameters of the LM "before" and "after" the cut.
        seconds: how long surgery took, validation excluded.
    """

    step_settings = ("at",)

    def __init__(self, at: Steps | None = None, validate: bool = True) -> None:
        vars(self).update(at=at)  # None or a share until the run's steps are known
        self.validate = validate
        self.plan = None
        self.step = None
        self.metrics = {}
        self.parameters = {}
        self.seconds = 0.0

    @property
    def begins(self) -> int:
        return self.at

    def check_settings(self) -> None:
        check_number(self, "at", self.at, whole=True, least=0)

    def check(self) -> None:
        pipeline, max_steps = self.pipeline, self.pipeline.trainer.max_steps
        averaging = [c for c in callbacks_of(pipeline.trainer) if isinstance(c, _WEIGHT_AVERAGING)]
        if averaging:
            raise ConfigError(
                f"{type(averaging[0]).__name__} keeps a copy of the uncut model and would average different layers "
                "after the cut: leave it out of trainer.callbacks, or average in a run of its own."
            )
        pipeline.adapter.check_cut()
        check_averages(pipeline.module, pipeline.anatomy)
        savers = pipeline.trainer.checkpoint_callbacks
        if savers and all(getattr(saver, "save_weights_only", False) for saver in savers):
            raise ConfigError(
                f"{type(savers[0]).__name__}.save_weights_only is true, which leaves out the plan that the checkpoint "
                "of a cut model is loaded by: set it to false, add a ModelCheckpoint that saves everything, or take "
                "the weights from an `ExportHF`."
            )
        cycle = self.cycle
        masking = [c for c in callbacks_of(pipeline.trainer) if isinstance(c, ModelPruning)]
        structures = {structure for selector in cycle.selectors for structure in selector.structures} - {"layers"}
        if masking and structures:
            raise ConfigError(
                f"{type(masking[0]).__name__} puts masks of the uncut sizes on the weights, which do not fit after a "
                f"cut of {', '.join(sorted(structures))}: leave it out of trainer.callbacks, or cut layers only."
            )
        if sum(cut.at == self.at for cut in pipeline.cuts) > 1:
            raise ConfigError(
                f"There is more than one StructuredCut at step {self.at}: leave one of them in trainer.callbacks."
            )
        if not cycle.selectors:
            raise ConfigError(
                f"The StructuredCut at step {self.at} has nothing to cut: add a selector to trainer.callbacks"
                + (" that starts after the cut before it." if cycle.index else ".")
            )
        for selector in cycle.selectors:
            if self.at < selector.stop:
                raise ConfigError(
                    f"StructuredCut.at is {self.at}, before {type(selector).__name__} ends its selection at step "
                    f"{selector.stop}: set StructuredCut.at to at least {selector.stop}."
                )
        if max_steps != -1 and max_steps < self.at:
            raise ConfigError(
                f"trainer.max_steps is {max_steps}, before the cut at {self.at}: raise trainer.max_steps, or lower "
                f"StructuredCut.at to at most {max_steps}."
            )

    def advance(self, step: int) -> None:
        if not self.done and step >= self.at and self.cycle is self.pipeline.cycle:
            self._cut(step)
        # Once more after a resume from the checkpoint that this very validation saved.
        if step == self.step and "after" not in self.metrics:
            self._measure("after")

    def _cut(self, step: int) -> None:
        plan = self.cycle.plan
        assert plan is not None, "the timeline was checked: selection ends before the cut"
        self._measure("before")
        for part in self.pipeline.parts:
            part.fold()
        for part in self.pipeline.parts:
            part.detach()
        for part in self.pipeline.parts:
            part.before_cut(plan)
        start = time.perf_counter()
        engine = self.pipeline.adapter
        engine.expect_skips(self is not self.pipeline.cut and any(part.skips_layers for part in self.pipeline.parts))
        engine.cut(self.pipeline.anatomy, plan)
        self.seconds = time.perf_counter() - start
        self.plan, self.step = plan, step

    def _measure(self, moment: str) -> None:
        self.parameters[moment] = self.pipeline.anatomy.num_parameters
        if self.validate:
            with no_checkpoints(self.pipeline.trainer) if moment == "before" else nullcontext():
                self.metrics[moment] = run_validation(self.pipeline.trainer)
            self.pipeline.log({f"cut/{moment}/{name}": value for name, value in self.metrics[moment].items()})

    def restructure(self, state: Mapping[str, Any]) -> None:
        plan = None if state["plan"] is None else PruningPlan.from_dict(state["plan"])
        anatomy = self.pipeline.anatomy
        if plan is not None and anatomy.shape == plan.source:
            cut_model(anatomy, plan)
        elif plan is None and self.plan is not None and anatomy.shape == self.plan.shape:
            raise ConfigError(
                "The checkpoint was saved before the cut and this model is already cut: build it anew to load that."
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            "step": self.step,
            "metrics": self.metrics,
            "parameters": self.parameters,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plan = None if state_dict["plan"] is None else PruningPlan.from_dict(state_dict["plan"])
        self.step = state_dict["step"]
        self.metrics = state_dict["metrics"]
        self.parameters = state_dict["parameters"]
        self.seconds = state_dict["seconds"]
