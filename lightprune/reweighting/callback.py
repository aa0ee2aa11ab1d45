"""`DomainReweighting`: per-domain losses become mixture weights while the run goes on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from transformers import PreTrainedModel

from lightprune.errors import ConfigError
from lightprune.integrations.lightning import (
    data_of,
    find_causal_lm,
    has_validation,
    is_training_pass,
    log_metrics,
    run_validation,
    validation_due,
)
from lightprune.integrations.ranks import sum_over_ranks
from lightprune.integrations.zero_params import parameter_count
from lightprune.metrics import DomainLoss
from lightprune.pipeline import FinishingCallback, Pipeline
from lightprune.pipeline.steps import Steps, resolve_steps
from lightprune.reweighting.checks import (
    check_data,
    check_length,
    check_settings,
    check_validated,
    check_validation,
    initial_ratio,
    warn_of_equal_shares,
    warn_of_rare_updates,
)
from lightprune.reweighting.figure import domain_figure
from lightprune.reweighting.history import History
from lightprune.reweighting.losses import DomainBatch, SampleLosses, TrainingLosses
from lightprune.reweighting.mixer import Mixer, Rule
from lightprune.reweighting.references import DynamicReference, FixedReference, Observation, Reference
from lightprune.reweighting.robust import Array
from lightprune.reweighting.sparsity import sparsity_of

HISTORY = 512
"""So many updates at most are kept for the plot, spread evenly over the run."""


class DomainReweighting(FinishingCallback):
    """Gives more data to the domains whose loss exceeds its reference most (DRPruning, arXiv 2411.14055).

    It goes beside any selector, regularizer and cut, in pruning, in recovery, or without either, and with any module
    whose batches carry `labels` [B, T] and `domain` [B], an index into the `domain_names` of the data module. That one
    must have `weights`, which are the initial ratio p, and `set_weights`, and bring its weights back in a resume. A
    domain of weight 0 stays out.

    At each update the excess of a domain is its loss minus its reference, in nats per token, and the weights q are

    * "robust": the mixture in the ball ½ Σ p (q/p − 1)² ≤ radius that makes the excess worst. Where no excess is
      positive, the references are scaled by 0.9, 0.8, ... until one is.
    * "sheared": q ∝ q·exp(excess), the rule of Sheared LLaMA (arXiv 2310.06694).
    * "constant": as they were; everything is logged all the same.

    They reach the model within the number of batches that the data module states. Every update logs
    `domains/{loss,excess,reference,weight,ratio,tokens}/<domain>`, tokens being those trained since this began. At
    the end it draws `domains.png` in the trainer's `default_root_dir`.

    Args:
        rule: how the weights follow from the excess.
        radius: ρ of the ball ("robust"); a domain's weight grows to at most 1 + sqrt(2ρ/p) times p.
        floor: the least q/p, before q is normalized ("robust").
        reference: "source": the validation loss of the model that the run began with. "dynamic": what a scaling law,
            fitted to the run so far, predicts for its end; the weights stay until the update that follows the first
            fit, which is made at 10% of the steps, or at the eleventh update behind 2% of them if that is later. Or a
            loss for each domain.
        losses: "training": the running mean of the training losses (0.1 for the newest step), every `every` steps.
            "validation": the validation losses, with the step that follows each validation.
        every: optimizer steps between two updates by training losses.
        dynamic_ratio: let the ratio p follow the weights from 20% of the steps on ("robust"). A share is kept between
            half and twice its initial one, and between the least and the greatest initial one of all, up to the
            normalization behind: where all domains begin with the same share, nothing moves.
        start: the optimizer step from which on it acts.
        stop: the optimizer step at which it ends, and with it "the run" in the shares above; the weights then stay as
            they are. None is the end of the run. `every`, `start` and `stop` may be shares of the run, such as "5%".
    """

    every: int
    start: int
    stop: int | None

    def __init__(
        self,
        rule: Rule = "robust",
        radius: float = 0.1,
        floor: float = 0.2,
        reference: Literal["source", "dynamic"] | dict[str, float] = "source",
        losses: Literal["training", "validation"] = "training",
        every: Steps = 50,
        dynamic_ratio: bool = False,
        start: Steps = 0,
        stop: Steps | None = None,
    ) -> None:
        self.rule: Rule = rule
        self.radius = radius
        self.floor = floor
        self.reference = reference
        self.losses = losses
        vars(self).update(every=every, start=start, stop=stop)  # shares of the run until `setup`
        self.dynamic_ratio = dynamic_ratio
        self.history = History(HISTORY)
        self._loaded: dict[str, object] = {}
        self._ready = False
        self._lm: PreTrainedModel
        self._domains: list[str]
        self._mixer: Mixer
        self._reference: Reference
        self._training: TrainingLosses
        self._validation: DomainLoss
        self._watched: dict[str, SampleLosses] = {}
        self._validated: Array | None = None  # the losses of a validation that no update has used yet
        self._validation_due = False
        self._parameters_at_start = 0
        self._end = math.inf
        self._step = 0
        self._begun = 0  # the step at which this began to count tokens

    # Before the first step.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            resolve_steps(self, ("every", "start", "stop"), trainer.max_steps)
            check_settings(self)
            check_data(self, trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build everything anew; the state from a checkpoint is taken over once training starts."""
        data = data_of(trainer)
        self._domains = list(data.domain_names)
        self._mixer = Mixer(
            initial_ratio(data.weights, self._domains),
            rule=self.rule,
            radius=self.radius,
            floor=self.floor,
            dynamic_ratio=self.dynamic_ratio,
        )
        self._reference = self._new_reference()
        device = trainer.strategy.root_device
        self._training = TrainingLosses(len(self._domains), device, sum_over_ranks)
        self._validation = DomainLoss(self._domains).to(device)
        _, self._lm = find_causal_lm(pl_module)
        self._watched = {"validation": SampleLosses(self._lm, lambda: trainer.validating)}
        if self.losses == "training":
            self._watched["training"] = SampleLosses(self._lm, lambda: is_training_pass(trainer))
        self._parameters_at_start = parameter_count(self._lm)
        self._validated, self._validation_due = None, False
        self._ready = True
        if not self._loaded:
            self.history = History(HISTORY)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._begun = trainer.global_step
        steps = trainer.estimated_stepping_batches
        self._end = min(self.stop or math.inf, math.inf if steps == -1 else steps)
        check_length(self, self._end)
        if self._loaded:
            self._take_over(self._loaded)
            self._loaded = {}
        elif self.reference == "source" and self._step > 0:
            raise ConfigError(
                f"DomainReweighting.reference='source' is measured before the first step, and this fit begins at step "
                f"{self._step} without a checkpoint that holds it: give the references as a mapping, or 'dynamic'."
            )
        if self._validation_wanted(trainer):
            check_validation(self, has_validation(trainer))  # only now are the loaders there: they may be empty
        if self.dynamic_ratio:
            warn_of_equal_shares(self._mixer.initial)
        warn_of_rare_updates(self, trainer, self._end)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the source model, unless a validation before the first step has done so."""
        if self._source_wanted(trainer):
            run_validation(trainer)

    # Training.

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._validation_due:  # the checkpoint was saved between the last step and its validation
            pipeline = Pipeline.of(trainer)
            if pipeline is not None:  # whose masks may not be back yet, if this callback is called first
                pipeline.advance()
            run_validation(trainer)
        watched = DomainBatch.of(batch, len(self._domains))
        if "training" in self._watched:
            self._watched["training"].begin(watched)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        losses = self._watched["training"].take(outputs) if "training" in self._watched else None
        self._training.add(DomainBatch.of(batch, len(self._domains)), losses)
        before, self._step = self._step, trainer.global_step
        if self._step > before:  # else gradients are still being accumulated
            self._training.step()
            if self._due(before):
                self._update(trainer)
        if self.losses == "validation":
            self._validation_due = validation_due(trainer)

    def _due(self, before: int) -> bool:
        """Whether the optimizer step that has just been done, or one of several, calls for an update."""
        if not self.start <= self._step < (self.stop or math.inf):
            return False
        if self.losses == "validation":
            return self._validated is not None
        return (self._step - self.start) // self.every > (before - self.start) // self.every

    def _update(self, trainer: L.Trainer) -> None:
        self._training.check()  # this is where the device is waited for
        losses, recent = self._current_losses()
        observation = self._observe(trainer, recent)
        compared = self._mixer.update(losses, self._reference.update(observation), observation.progress)
        # Ranks have the same losses; a fit on another kind of processor may differ in the last bit.
        self._mixer.weights = np.array(trainer.strategy.broadcast(self._mixer.weights.tolist()))
        if self.rule != "constant":
            data = data_of(trainer)
            data.set_weights(dict(zip(self._domains, self._mixer.weights.tolist(), strict=True)))
        self._training.begin_interval()
        values = {
            "loss": losses,
            "excess": compared.excess,
            "reference": compared.reference,
            "weight": self._mixer.weights,
            "ratio": self._mixer.ratio,
            "tokens": observation.tokens,
        }
        self.history.append({"step": self._step, **{name: value.tolist() for name, value in values.items()}})
        self._log(trainer, values)

    def _current_losses(self) -> tuple[Array, Array]:
        """The losses [D] to compare with the references, and those since the last update, for the scaling law."""
        if self.losses == "validation":
            assert self._validated is not None
            losses, self._validated = self._validated, None
            return losses, losses
        return _array(self._training.running_mean), _array(self._training.since_last_update)

    def _observe(self, trainer: L.Trainer, losses: Array) -> Observation:
        tokens = _array(self._training.tokens)
        known = not math.isinf(self._end)
        sparsity, final_sparsity = sparsity_of(trainer, parameter_count(self._lm), self._parameters_at_start)
        return Observation(
            progress=(self._step - self.start) / (self._end - self.start) if known else 0.0,
            losses=losses,
            tokens=tokens,
            sparsity=sparsity,
            final_tokens=tokens * (self._end - self._begun) / (self._step - self._begun) if known else tokens,
            final_sparsity=final_sparsity,
        )

    def _log(self, trainer: L.Trainer, values: Mapping[str, Array]) -> None:
        metrics = {
            f"domains/{name}/{domain}": float(value)
            for name, of_domains in values.items()
            for domain, value in zip(self._domains, of_domains, strict=True)
            if np.isfinite(value)
        }
        log_metrics(trainer, metrics)

    # Validation, whoever runs it.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validation_wanted(trainer):
            self._validation.reset()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validation_wanted(trainer):
            self._watched["validation"].begin(DomainBatch.of(batch, len(self._domains)))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validation_wanted(trainer):
            losses = self._watched["validation"].take(outputs)
            if losses is not None:
                self._validation.update(*losses, batch["domain"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._validation_wanted(trainer):
            return
        found = self._validation.compute()
        losses = np.array([float(found.get(f"loss/{name}", math.nan)) for name in self._domains])
        check_validated(losses, self._mixer.initial, self._domains)
        if self._source_wanted(trainer):
            assert isinstance(self._reference, FixedReference)
            self._reference.losses = losses
        if self.losses == "validation" and trainer.global_step >= max(self.start, 1):
            self._validated = losses
        self._validation_due = False

    def _validation_wanted(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return False
        return self.losses == "validation" or self._source_wanted(trainer)

    def _source_wanted(self, trainer: L.Trainer) -> bool:
        unknown = isinstance(self._reference, FixedReference) and self._reference.losses is None
        return unknown and trainer.global_step == 0

    # The end, and resuming.

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the run, if there was an update."""
        if trainer.is_global_zero and len(self.history):
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            domain_figure(self._domains, list(self.history)).savefig(folder / "domains.png")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()
        self._loaded = {}  # a resume that found training over has not used it

    def state_dict(self) -> dict[str, Any]:
        """Plain values of bounded size, the same on every rank."""
        if self._loaded or not self._ready:  # not taken over: no step has been trained since
            return self._loaded
        return {
            "domains": self._domains,
            "reference": [self._reference_kind, self._reference.state_dict()],
            "mixer": self._mixer.state_dict(),
            "training": self._training.state_dict(),
            "validated": None if self._validated is None else self._validated.tolist(),
            "validation_due": self._validation_due,
            "parameters_at_start": self._parameters_at_start,
            "begun": self._begun,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        if state_dict:
            self.history.load_state_dict(state_dict["history"])

    def _take_over(self, state: Mapping[str, Any]) -> None:
        kind, reference = state["reference"]
        for key, there, here in (
            ("data.domains", state["domains"], self._domains),
            ("DomainReweighting.reference", kind, self._reference_kind),
        ):
            if there != here:
                raise ConfigError(
                    f"The checkpoint was saved with {key} = {there}, and this run has {here}: resume with "
                    "the same, or start a new run."
                )
        if kind != "mapping":
            self._reference.load_state_dict(reference)
        self._mixer.load_state_dict(state["mixer"])
        self._training.load_state_dict(state["training"])
        self._validated = None if state["validated"] is None else np.array(state["validated"])
        self._validation_due = state["validation_due"]
        self._parameters_at_start = state["parameters_at_start"]
        self._begun = state["begun"]

    @property
    def _reference_kind(self) -> str:
        return self.reference if isinstance(self.reference, str) else "mapping"

    def _new_reference(self) -> Reference:
        if self.reference == "dynamic":
            return DynamicReference()
        if isinstance(self.reference, Mapping):
            return FixedReference(np.array([self.reference[name] for name in self._domains], dtype=np.float64))
        return FixedReference()

    def _close(self) -> None:
        for losses in self._watched.values():
            losses.close()
        if self._ready:
            self._reference.close()


def _array(values: torch.Tensor) -> Array:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
