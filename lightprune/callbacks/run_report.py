"""`RunReport`: what a run cost and what became of the model, as `summary.json` and as a table at the end."""

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from rich.console import Console, Group
from rich.table import Table
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lightprune.errors import ConfigError
from lightprune.integrations.lightning import find_causal_lm, is_training_pass, run_validation
from lightprune.integrations.zero_params import parameter_count
from lightprune.masks.forward_passes import attention_mask_of, call_inputs
from lightprune.pipeline import FinishingCallback, Phase, Pipeline, finish_parts

Metrics = dict[str, float]

# What wall time is booked on, in the order of the table.
PHASES = (*get_args(Phase), "validation")
PACKAGES = ("lightprune", "torch", "lightning", "transformers", "datasets")


class RunReport(FinishingCallback):
    """Writes `summary.json` to the trainer's `default_root_dir` and prints its tables when training ends.

    It holds the model's counts before and after, the validation metrics at the start, just before each cut, just after
    it and at the end, the training tokens and the wall time of every phase, the seed, the precision, the versions, and
    the pruning plan. Whatever a module logs in validation is reported under its own names. In a run without pruning
    callbacks, without validation data or without a Hugging Face model, what cannot be known is left out; so are the
    metrics at the end where a resume finds nothing left to train. If the run ended before a cut, `ended_before_cut` is
    the step that this cut was set to; else it is null.

    Tokens are those that the language model sees in training batches, padding excluded where an
    `attention_mask` tells; they are summed over ranks. Totals go on after a resume, where each rank continues
    from those of rank zero.

    Args:
        validate_at_start: run the validation loop before the first training step of a fresh run.

    Attributes:
        precision_reason: why the run has its precision, if whoever chose it says so.
    """

    precision_reason: str | None = None

    def __init__(self, validate_at_start: bool = True) -> None:
        self.validate_at_start = validate_at_start
        self._precision: dict[str, str | None] = {}
        self._phase = "validation"
        self._mark: float | None = None
        self._hook: RemovableHandle | None = None
        self._forget()

    def _forget(self) -> None:
        self._tokens: dict[str, int | torch.Tensor] = {}
        self._seconds: dict[str, float] = {}
        self._metrics: dict[str, Metrics] = {}
        self._before: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start again from zero, unless this trainer continues an earlier fit."""
        super().setup(trainer, pl_module, stage)
        self._precision = {"used": str(trainer.precision), "reason": self.precision_reason}
        if stage == "fit" and trainer.global_step == 0:
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The totals so far."""
        return {
            "tokens": {phase: int(count) for phase, count in self._tokens.items()},
            "seconds": dict(self._seconds),
            "metrics": {moment: dict(metrics) for moment, metrics in self._metrics.items()},
            "before": dict(self._before),
            "precision": dict(self._precision),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the totals of the run that wrote the checkpoint."""
        self._tokens = dict(state_dict["tokens"])
        self._seconds = dict(state_dict["seconds"])
        self._metrics = dict(state_dict["metrics"])
        self._before = dict(state_dict["before"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what is there and, in a fresh run, validate it."""
        model = _language_model(trainer, pl_module)
        count = partial(self._count_tokens, trainer)
        self._hook = _decoder(trainer, model).register_forward_pre_hook(count, with_kwargs=True)
        self._before = self._before or _size(trainer, model)
        self._phase = "validation"
        self._mark = time.perf_counter()
        if self.validate_at_start and trainer.global_step == 0:
            self._metrics["start"] = run_validation(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Note which phase the batch belongs to: by its end the pipeline may have moved on."""
        pipeline = Pipeline.of(trainer)
        if pipeline is not None:  # the first batch may be one of a later phase than the run began in
            pipeline.advance()
        self._phase = _phase(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Add the time since the last batch to its phase."""
        self._lap(self._phase)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep validation out of the phase's time."""
        self._lap(self._phase)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count validation separately."""
        self._lap("validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate once more, and finish."""
        finish_parts(trainer)
        self._metrics["end"] = run_validation(trainer)
        super().on_train_end(trainer, pl_module)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and print the summary."""
        tokens = {phase: _sum_over_ranks(trainer, count) for phase, count in self._tokens.items()}
        summary = self._summary(trainer, pl_module, tokens)
        if trainer.is_global_zero:
            path = write_summary(summary, Path(trainer.default_root_dir))
            console = Console()
            console.print(summary_tables(summary))
            console.print(f"Written to {path}", soft_wrap=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook on the model."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook on the model here either: Lightning does not call `teardown` after an exception."""
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._mark = None, None

    def _lap(self, phase: str) -> None:
        if self._mark is not None:
            now = time.perf_counter()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
            self._mark = now

    def _count_tokens(
        self, trainer: pl.Trainer, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """A tensor total stays on its device: reading it at every step would stall a GPU."""
        if not is_training_pass(trainer):  # a selector searches on a batch that has been counted
            return
        inputs = call_inputs(model, args, kwargs)
        mask = attention_mask_of(inputs)
        seen = inputs.get("input_ids", inputs.get("inputs_embeds"))  # [B, T] or [B, T, d]
        if mask is not None:
            self._tokens[self._phase] = self._tokens.get(self._phase, 0) + mask.sum()
        elif seen is not None:
            self._tokens[self._phase] = self._tokens.get(self._phase, 0) + seen.shape[:2].numel()

    def _summary(self, trainer: pl.Trainer, module: pl.LightningModule, tokens: Mapping[str, int]) -> dict[str, object]:
        pipeline = Pipeline.of(trainer)
        cuts = [] if pipeline is None else [cut for cut in pipeline.cuts if cut.done]
        plan = None if pipeline is None else pipeline.executed
        metrics = {"start": self._metrics.get("start")}
        for number, cut in enumerate(cuts, start=1):
            name = "cut" if len(cuts) == 1 else f"cut_{number}"
            metrics |= {f"{moment}_{name}": values for moment, values in cut.metrics.items()}
        metrics["end"] = self._metrics.get("end")
        after = _size(trainer, _language_model(trainer, module))
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "before": self._before,
            "after": after,
            "dropped_layers": None if plan is None else list(plan.dropped_layers),
            "plan": None if plan is None else plan.to_dict(),
            "cut_steps": [cut.step for cut in cuts],
            "steps": trainer.global_step,
            "ended_before_cut": None if pipeline is None else next((c.at for c in pipeline.cuts if not c.done), None),
            "metrics": {moment: values for moment, values in metrics.items() if values},
            "phases": {
                phase: {"tokens": tokens.get(phase, 0), "seconds": round(self._seconds[phase], 3)}
                for phase in PHASES
                if phase in self._seconds
            },
            "seed": None if seed is None else int(seed),
            "precision": self._precision,
            "versions": versions(),
        }


def recorded_precision(states: Mapping[str, object]) -> str | None:
    """The precision that a report has noted in the states of a checkpoint's callbacks; None if there is none.

    Args:
        states: the state of each callback, by its `state_key`.
    """
    for state in states.values():
        noted = state.get("precision") if isinstance(state, Mapping) else None
        used = noted.get("used") if isinstance(noted, Mapping) else None
        if isinstance(used, str):
            return used
    return None


def write_summary(summary: Mapping[str, object], directory: Path) -> Path:
    """Write `summary.json`; an older one becomes `summary.1.json`, or takes the first number that is free.

    JSON has no infinities and no NaN: such numbers are written as null.

    Returns:
        The file written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "summary.json"
    if path.exists():
        number = 1
        while (older := directory / f"summary.{number}.json").exists():
            number += 1
        path.rename(older)
    path.write_text(json.dumps(_finite(summary), indent=2) + "\n")
    return path


def summary_tables(summary: Mapping[str, Any]) -> Group:
    """What a summary says, for a terminal: sizes, metrics (only perplexities if there are any), phases."""
    before, after, dropped = summary["before"], summary["after"], summary["dropped_layers"]
    told = [name for name in before if before[name] != after[name] or name in ("layers", "parameters")]
    size = Table(title="Model", title_justify="left")
    for heading in ("", "before", "after"):
        size.add_column(heading, justify="left" if not heading else "right")
    for name in told:
        size.add_row(name, f"{before[name]:,}", f"{after[name]:,}")
    tables = [size]
    if summary["metrics"]:
        tables.append(_metric_table(summary["metrics"]))
    phases = Table("phase", title="Training", title_justify="left")
    phases.add_column("tokens", justify="right")
    phases.add_column("wall time", justify="right")
    for phase, cost in summary["phases"].items():
        phases.add_row(phase, f"{cost['tokens']:,}", f"{cost['seconds']:,.1f} s")
    tables.append(phases)
    if dropped is None:
        return Group(*tables)
    layers = f"; layers dropped: {', '.join(map(str, dropped))}" if dropped else ""
    return Group(*tables, f"Cut at step {', '.join(map(str, summary['cut_steps']))}{layers}")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run does, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _metric_table(metrics: Mapping[str, Metrics]) -> Table:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    table = Table("validation", title="Metrics", title_justify="left")
    for moment in metrics:
        table.add_column(moment.replace("_cut", " the cut").replace("cut_", "cut "), justify="right")
    for name in [name for name in names if "ppl" in name] or names:
        table.add_row(name, *(f"{v[name]:,.4g}" if name in v else "" for v in metrics.values()))
    return table


def _language_model(trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module:
    """The language model inside the module; the module itself if it holds none."""
    pipeline = Pipeline.of(trainer)
    if pipeline is not None:
        return pipeline.lm
    try:
        return find_causal_lm(module)[1]
    except ConfigError:
        return module


def _decoder(trainer: pl.Trainer, model: nn.Module) -> nn.Module:
    """What every forward pass of the model goes through: a loss of the module's own may never call the model itself."""
    pipeline = Pipeline.of(trainer)
    if pipeline is not None:
        return pipeline.anatomy.decoder
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _phase(trainer: pl.Trainer) -> str:
    pipeline = Pipeline.of(trainer)
    return "train" if pipeline is None else pipeline.phase


def _size(trainer: pl.Trainer, model: nn.Module) -> dict[str, int]:
    """The counts that make up the model, where the anatomy is known, and its parameters."""
    pipeline = Pipeline.of(trainer)
    counts = {} if pipeline is None else asdict(pipeline.anatomy.shape)
    return {**counts, "parameters": parameter_count(model)}


def _sum_over_ranks(trainer: pl.Trainer, count: int | torch.Tensor) -> int:
    total = torch.as_tensor(count, dtype=torch.long, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(total, reduce_op="sum"))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
