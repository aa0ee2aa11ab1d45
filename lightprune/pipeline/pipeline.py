"""The pipeline: what binds the pruning callbacks of one trainer to its module, its model and its strategy."""

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from lightprune import strategies
from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.integrations.lightning import callbacks_of, find_causal_lm, is_training_pass, log_metrics, shadow_method
from lightprune.integrations.zero_params import whole_construction
from lightprune.pipeline import run_checks
from lightprune.pipeline.attach_checks import check_attached, check_hooks
from lightprune.pipeline.held_weights import HeldWeights
from lightprune.pipeline.part import CuttingPart, Cycle, DecidingPart, Part
from lightprune.pipeline.schedule import cycles_of, place_cuts, unfinished
from lightprune.pipeline.stages import Phase, Status, parts_last
from lightprune.pipeline.step_hooks import StepHooks
from lightprune.plan import PruningPlan


class Pipeline:
    """The parts of one trainer, in the order of their stages, and the model that they work on."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.module = module
        self.fitting = stage == "fit"
        self.parts = _parts_of(trainer)
        for part in self.parts:
            part.resolve_steps(trainer.max_steps)
        place_cuts(self.parts)
        for part in self.parts:
            part.check_settings()
        self.parts.sort(key=lambda part: (part.stage, part.begins))
        self.cycles = cycles_of(self.selectors, self.cuts)
        self.adapter = strategies.adapter_of(trainer)
        self.anatomy: Anatomy
        self._restored: frozenset[str] = frozenset()  # the states of parts that come from a checkpoint
        self._evaluated: int | None = None  # the step of the checkpoint that is evaluated outside a fit
        self._ended = False
        self._unwrap: list[Callable[[], None]] = []
        self.weights = HeldWeights(module)
        self._step_hooks = StepHooks(self.adapter, self.parts, self.weights)

    @classmethod
    def of(cls, trainer: L.Trainer) -> "Pipeline | None":
        """The trainer's pipeline; None if it has no pruning callbacks or has not set them up yet."""
        found = [part.pipeline for part in _parts_of(trainer) if hasattr(part, "pipeline")]
        return next((p for p in found if isinstance(p, cls) and p.trainer is trainer), None)

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
    def selectors(self) -> list[DecidingPart]:
        """The parts that decide the plan."""
        return [part for part in self.parts if isinstance(part, DecidingPart)]

    @property
    def cuts(self) -> list[CuttingPart]:
        """The parts that execute plans, in the order of their steps."""
        return [part for part in self.parts if isinstance(part, CuttingPart)]

    @property
    def cut(self) -> CuttingPart | None:
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
        self._step_hooks.begin_batch()
        self.advance()

    def end_batch(self) -> None:
        """A batch has trained, or was skipped."""
        self._step_hooks.end_batch()
        for part in self.parts:
            part.end_batch()
        self.advance()

    def advance(self) -> None:
        """Move every part to where it has to be after the optimizer steps done so far."""
        for part in self.parts:
            part.advance(self.step)

    def check_run(self) -> None:
        """Check what can only be checked once data and optimizers exist, still before the first step."""
        run_checks.check_run(self)
        check_hooks(self)
        for part in self.parts:
            part.shaped_by = self

    def evaluate(self) -> None:
        """If a checkpoint is evaluated outside a fit, let the model compute what it did when it was saved."""
        if self._evaluated is None:
            return
        undecided = [selector for selector in self.selectors if selector.plan is None and selector.stop <= self.step]
        with torch.inference_mode(False):  # a fit may go on with what is made here
            for part in self.parts:
                if part.alters and part.state_key in self._restored and part not in undecided:
                    part.advance(self.step)

    def finish(self) -> None:
        """Let the parts leave an ordinary model. The first callback that acts at the end of training calls this."""
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
        self._unwrap += [handle.remove for handle in self._step_hooks.watch(self.anatomy.decoder)]
        if self.fitting:
            check_attached(self)
            for part in self.parts:
                part.built()

    def close(self) -> None:
        """Restore the module and the strategy as they were found."""
        for part in self.parts:
            part.detach()
        self.weights.release()
        self.adapter.expect_skips(False)
        while self._unwrap:
            self._unwrap.pop()()

    def _wrap_all(self) -> None:
        if self.fitting:
            self.adapter.check()
            self.adapter.expect_skips(any(part.skips_layers for part in self.parts))
            self.shadow(self.trainer.strategy, self.adapter.makes_optimizers, self._make_optimizers)
        self.shadow(self.module, "configure_model", self._configure_model)
        self.shadow(self.trainer.strategy, "load_checkpoint", self._load_checkpoint)
        self._unwrap += self._step_hooks.open()

    def shadow(self, owner: object, name: str, replacement: Callable[..., object]) -> None:
        """Shadow a method on the instance until `close`; `replacement` gets the original first."""
        self._unwrap.append(shadow_method(owner, name, replacement))

    def _configure_model(self, original: Callable[[], None]) -> None:
        original()
        with whole_construction():  # the checks build models of their own
            self.attach()

    def _make_optimizers(self, original: Callable[..., object], *args: object) -> object:
        made = original(*args)
        self.adapter.check_made(self.adapter.made(made))
        return made

    def _load_checkpoint(
        self, original: Callable[..., dict[str, Any]], checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> dict[str, object]:
        run_checks.check_checkpoint(checkpoint_path, self.trainer.strategy.checkpoint_io)
        checkpoint = self.adapter.load(original, self._restructure, checkpoint_path, *args, **kwargs)
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
            self.adapter.expect_skips(False)


def _parts_of(trainer: L.Trainer) -> list[Part]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Part)]
