"""`LightpruneCLI`: LightningCLI with pruning's verbs, and the entry point."""

import json
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightprune
from lightprune.cli.collection import no_collection
from lightprune.cli.early import VERBS
from lightprune.cli.mistakes import explain
from lightprune.cli.overrides import apply_overrides, split_overrides
from lightprune.cli.parsing import guess_callbacks, parse, read_callbacks
from lightprune.cli.trainer import PruningTrainer
from lightprune.errors import ConfigError
from lightprune.integrations.command_line import OpenCLI, make_flag

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


# The callbacks that a run has without naming them in its config.
DEFAULT_CALLBACKS = {
    "PruningProgressBar": "lightprune.PruningProgressBar",
    "RunReport": "lightprune.RunReport",
    "RandomState": "lightprune.RandomState",
    "DomainCounts": "lightprune.data.DomainCounts",
}

# Public names that are no callbacks.
_OTHERS = {
    "Anatomy",
    "CausalLM",
    "ConfigError",
    "ExportError",
    "Family",
    "LayerSelector",
    "Part",
    "Pipeline",
    "PruningCallback",
    "PruningPlan",
    "Regularizer",
    "Selector",
    "Target",
    "UnitSelector",
    "anatomy_of",
    "export_hf",
    "outlive_preemption",
    "register_family",
}

# Said in each command's help, as the parser itself names only classes that are imported already.
ABOUT = (
    "--callback.NAME.ARGUMENT VALUE sets one argument of one callback of the config, such as "
    "--callback.StructuredCut.at 64. lightprune brings the model lightprune.CausalLM, the data "
    "lightprune.data.TextDataModule and the callbacks "
    + ", ".join(f"lightprune.{name}" for name in lightprune.__all__ if name not in _OTHERS)
    + "."
)


class LightpruneCLI(OpenCLI):
    """LightningCLI for any module and data module, by `class_path`, with pruning's verbs and defaults."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            trainer_class=PruningTrainer,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Raise what argparse would print below a page of usage.
            parser_kwargs={
                "exit_on_error": False,
                **{verb: {"exit_on_error": False, "description": _description(verb)} for verb in VERBS},
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, each with the arguments that come from the config."""
        verbs = LightningCLI.subcommands()
        ours = {"model", "datamodule"}
        return {name: verbs.get(name, ours) for name in VERBS}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read the arguments and the config files; `--callback.NAME.ARGUMENT` sets one argument of a callback there."""
        make_flag(self.parser_of("export"), "--overwrite")
        given = args if isinstance(args, list) else sys.argv[1:]
        with no_collection():  # the config's classes are imported here
            arguments, overrides = split_overrides(given)
            try:
                if overrides and not {"-h", "--help"} & set(arguments):
                    callbacks = apply_overrides(read_callbacks(parser, arguments), overrides, DEFAULT_CALLBACKS)
                    arguments.append(f"--trainer.callbacks={json.dumps(callbacks)}")
                self.config = parse(parser, arguments)
            except ArgumentError as error:
                verb = next((argument for argument in arguments if argument in VERBS), "lightprune")
                settings = list(self.parser_of(verb).get_defaults().keys()) if verb in VERBS else []
                callbacks_there = guess_callbacks(parser, arguments)
                raise ConfigError(explain(str(error), verb, settings, callbacks_there)) from error

    def before_checkpoint(self, path: str) -> None:
        """Refuse a path that is no checkpoint: Lightning would read the weights only much later."""
        if path not in ("last", "best", "hpc") and not path.startswith("registry"):
            from lightprune.pipeline.run_checks import check_checkpoint

            check_checkpoint(path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the progress bar and the report where the config does not bring its own."""
        config = self.setting(self.config_init, "trainer")
        callbacks = config["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        defaults = default_callbacks(callbacks, progress_bar=config["enable_progress_bar"] is not False)
        # In front, so that the report's last validation is there when the export writes its model card.
        callbacks = [*defaults, *callbacks]
        try:
            if self.subcommand in ("plan", "export"):
                kwargs |= OFFLINE
            else:
                kwargs |= self._precision(dict(config), callbacks)
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        # Of an argument of the Trainer's, or two callbacks with one state.
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error

    def _precision(self, config: Mapping[str, object], callbacks: Sequence[Callback]) -> dict[str, str | None]:
        """What the trainer gets for `precision`; reports get the reason."""
        from lightprune.callbacks.run_report import RunReport
        from lightprune.cli.precision import choose_precision

        choice = choose_precision(config, callbacks, self.setting(self.config, "ckpt_path"))
        for callback in callbacks:
            if choice is not None and isinstance(callback, RunReport):
                callback.precision_reason = choice.reason
        return {"precision": None if choice is None else choice.used}


def default_callbacks(given: Sequence[Callback], *, progress_bar: bool) -> list[Callback]:
    """The callbacks that every run has, less those that `given` already provides."""
    from lightprune.callbacks.progress import PruningProgressBar
    from lightprune.callbacks.random_state import RandomState
    from lightprune.callbacks.run_report import RunReport
    from lightprune.data import DomainCounts

    defaults: list[Callback] = []
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in given):
        defaults.append(PruningProgressBar())
    for kind in (RunReport, RandomState, DomainCounts):
        if not any(isinstance(callback, kind) for callback in given):
            defaults.append(kind())
    return defaults


def _description(verb: str) -> str:
    return f"{verb}: {VERBS[verb]}. {ABOUT}"
