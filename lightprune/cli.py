"""`lightprune fit | validate | test | plan | export`: LightningCLI with pruning's verbs."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, Group
from rich.table import Table

from lightprune.cut import StructuredCut
from lightprune.cycle import expected_shapes
from lightprune.data import DomainCounts
from lightprune.errors import ConfigError
from lightprune.export import card_of, check_target, export_hf, tokenizer_of
from lightprune.host import callbacks_of, find_causal_lm
from lightprune.pipeline import Part, Pipeline
from lightprune.plan import PruningPlan
from lightprune.progress import PruningProgressBar
from lightprune.random_state import RandomState
from lightprune.regularizers.base import Regularizer
from lightprune.report import RunReport
from lightprune.reweighting import DomainReweighting
from lightprune.run_checks import check_checkpoint
from lightprune.selectors.base import Selector
from lightprune.surgery import resulting_parameters

# What reads or reshapes a model and trains nothing runs on any machine, whatever the config trains on.
OFFLINE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "plugins": None,
    "logger": False,
}


class PruningTrainer(pl.Trainer):
    """A Trainer with the two verbs that need a model and no training."""

    def plan(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print what a config would cut, when, and the shape that results; trains nothing."""
        with self._pipeline(model, stage="fit") as pipeline:
            Console().print(forecast(pipeline))

    def export(
        self,
        model: pl.LightningModule,
        ckpt_path: str,
        output: str,
        datamodule: pl.LightningDataModule | None = None,
        overwrite: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        """Write the model of a checkpoint as a Hugging Face directory.

        Args:
            model: the module that was trained.
            ckpt_path: a checkpoint of a run with the same config; "last" is the newest of its `ModelCheckpoint`.
            output: the directory to write.
            datamodule: not used.
            overwrite: replace `output` if it exists.
            weights_only: as in `fit`.
        """
        if ckpt_path == "last":
            ckpt_path = _last_of(self)
        check_target(output, overwrite=overwrite, key="output")
        with self._pipeline(model, stage="validate") as pipeline:
            # The pipeline gives the model its shape; states and weights are for us to load.
            checkpoint = self.strategy.load_checkpoint(ckpt_path, weights_only=weights_only)
            plan = restore(pipeline, checkpoint, source=ckpt_path)
            pipeline.finish()
            card = card_of(self)
            card["data"] = {"optimizer steps": checkpoint["global_step"]}
            tokenizer = tokenizer_of(self, model)
            target = export_hf(pipeline.lm, output, tokenizer=tokenizer, plan=plan, card=card, overwrite=overwrite)
        print(f"Exported to {target}")

    @contextmanager
    def _pipeline(self, model: pl.LightningModule, *, stage: str) -> Iterator[Pipeline]:
        """The pipeline of the trainer's callbacks around the built model, as `fit` would make it."""
        self.strategy.connect(model)
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Part):
                callback.setup(self, model, stage)
        pipeline = Pipeline.of(self)
        if pipeline is None or pipeline.cut is None:
            raise ConfigError("Nothing is to be cut: add a selector and a StructuredCut to trainer.callbacks.")
        try:
            model.configure_model()
            yield pipeline
        finally:
            pipeline.close()


def _last_of(trainer: pl.Trainer) -> str:
    """The checkpoint that `fit --ckpt_path last` would go on from."""
    found = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    if found is None:
        raise ConfigError("There is no last checkpoint of this config: name one in `ckpt_path`.")
    return str(found)


class LightpruneCLI(LightningCLI):
    """LightningCLI for any module and data module, by `class_path`, with pruning's verbs and defaults."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            trainer_class=PruningTrainer,
            trainer_defaults={"use_distributed_sampler": False},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Raise what argparse would print below a page of usage.
            parser_kwargs={
                "exit_on_error": False,
                **{verb: {"exit_on_error": False} for verb in self.subcommands()},
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, each with the arguments that come from the config."""
        verbs = LightningCLI.subcommands()
        ours = {"model", "datamodule"}
        return {name: verbs[name] for name in ("fit", "validate", "test")} | {"plan": ours, "export": ours}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Let `--overwrite` stand alone, as a flag does."""
        overwrite = self._subcommand_parsers["export"]._option_string_actions["--overwrite"]
        overwrite.nargs, overwrite.const = "?", True
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Lightning reads the hyperparameters in a checkpoint before there is a trainer."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and Path(path).is_file():
            check_checkpoint(path)
        super()._parse_ckpt_path()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the progress bar and the report where the config does not bring its own."""
        config = self._get(self.config_init, "trainer")
        callbacks = config["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        defaults = default_callbacks(callbacks, progress_bar=config["enable_progress_bar"] is not False)
        # In front, so that the report's last validation is there when the export writes its model card.
        callbacks = [*defaults, *callbacks]
        offline = OFFLINE if self.subcommand in ("plan", "export") else {}
        try:
            return super().instantiate_trainer(callbacks=callbacks, **offline, **kwargs)
        except (ValueError, RuntimeError) as error:  # of an argument of the Trainer's, or two callbacks with one state
            raise ConfigError(str(error)) from error


def default_callbacks(given: Sequence[Callback], *, progress_bar: bool) -> list[Callback]:
    """The callbacks that every run has, less those that `given` already provides."""
    defaults: list[Callback] = []
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in given):
        defaults.append(PruningProgressBar())
    for kind in (RunReport, RandomState, DomainCounts):
        if not any(isinstance(callback, kind) for callback in given):
            defaults.append(kind())
    return defaults


def restore(pipeline: Pipeline, checkpoint: Mapping[str, Any], *, source: str) -> PruningPlan:
    """Load a checkpoint's pruning states and the language model's weights.

    Returns:
        The plan that was executed.

    Raises:
        ConfigError: the checkpoint holds an uncut model, or weights that are not those of this model.
    """
    for part in pipeline.parts:
        if part.state_key in checkpoint["callbacks"]:
            part.load_state_dict(checkpoint["callbacks"][part.state_key])
    plan = pipeline.executed
    if plan is None:
        raise ConfigError(f"The checkpoint {source!r} holds an uncut model: name one that was saved after the cut.")
    path, lm = find_causal_lm(pipeline.module)
    prefix = f"{path}." if path else ""
    weights = checkpoint["state_dict"]
    try:
        lm.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise ConfigError(
            f"The weights in {source!r} do not fit the model: use the configs of the run that wrote them."
        ) from error
    return plan


def forecast(pipeline: Pipeline) -> Group:
    """What a run would cut, for a terminal: shapes, changed fields of the model's config, timeline of steps."""
    anatomy = pipeline.anatomy
    source, *shapes = expected_shapes(pipeline.cycles, anatomy)
    # Which units go does not matter for the counts: a family's layers are all alike.
    plan = PruningPlan.arriving_at(anatomy, shapes[-1])
    before, after = anatomy.num_parameters, resulting_parameters(anatomy, plan)
    table = Table("", title=f"{type(anatomy.lm).__name__}", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, count in asdict(source).items():
        if name == "layers" or count != getattr(shapes[-1], name):
            table.add_row(name, str(count), str(getattr(shapes[-1], name)))
    table.add_row("parameters", f"{before:,}", f"{after:,} ({after / before - 1:+.1%})")
    old, new = anatomy.config.to_dict(), plan.config(anatomy).to_dict()
    for name in (name for name in new if new[name] != old.get(name)):
        table.add_row(f"config.{name}", _brief(old.get(name)), _brief(new[name]))
    return Group(table, *map(_decision, pipeline.selectors), _timeline(pipeline))


def _decision(selector: Selector) -> str:
    """What a selector will take away, as far as that is known before training."""
    plan = selector.foresee() if selector.cycle.index == 0 and "layers" in selector.structures else None
    if plan is None:
        return (
            f"{type(selector).__name__} decides about {', '.join(sorted(selector.structures))} at step {selector.stop}."
        )
    return f"Layers that go: {', '.join(map(str, plan.dropped_layers))}."


def _timeline(pipeline: Pipeline) -> Table:
    table = Table("part", title="Timeline in optimizer steps", title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    for part in pipeline.parts:
        table.add_row(type(part).__name__, *_window(part, pipeline))
    for callback in callbacks_of(pipeline.trainer):
        if isinstance(callback, DomainReweighting):
            stop = "end" if callback.stop is None else str(callback.stop)
            table.add_row(type(callback).__name__, str(callback.start), stop)
    steps, epochs = pipeline.trainer.max_steps, pipeline.trainer.max_epochs
    table.add_row("end of the run", str(steps) if steps != -1 else f"{epochs} epochs", "")
    return table


def _window(part: Part, pipeline: Pipeline) -> tuple[str, str]:
    """The optimizer steps at which a part begins and ends, as its settings tell them."""
    if isinstance(part, Selector):
        return str(part.start), str(part.stop)
    if isinstance(part, Regularizer):
        windows = [part.window(cycle) for cycle in part.cycles()]
        return ", ".join(str(start) for start, _ in windows), ", ".join(str(stop) for _, stop in windows)
    if isinstance(part, StructuredCut):
        return str(part.at), ""
    assert pipeline.cut is not None
    return str(pipeline.cut.at), "end"


def _brief(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else str(value)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user's is one sentence on stderr and status 2.

    Args:
        args: the arguments; None for those of the process. LIGHTPRUNE_DEBUG=1 in the environment shows tracebacks.

    Returns:
        The exit status.
    """
    try:
        LightpruneCLI(args)
    except Exception as error:
        mistake = _user_mistake(error)
        if mistake is None or os.environ.get("LIGHTPRUNE_DEBUG") == "1":
            raise
        print(mistake, file=sys.stderr)
        return 2
    return 0


def _user_mistake(error: BaseException | None) -> str | None:
    """What the user got wrong, if `error` is about that: jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, ConfigError | ArgumentError | MisconfigurationException):
            return str(error)
        error = error.__cause__
    return None
