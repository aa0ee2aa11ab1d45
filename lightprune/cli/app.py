"""`LightpruneCLI`: LightningCLI with pruning's verbs, and the entry point."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightprune.cli.precision import choose_precision
from lightprune.cli.trainer import PruningTrainer
from lightprune.data import DomainCounts
from lightprune.errors import ConfigError
from lightprune.progress import PruningProgressBar
from lightprune.random_state import RandomState
from lightprune.report import RunReport
from lightprune.run_checks import check_checkpoint

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
        try:
            if self.subcommand in ("plan", "export"):
                kwargs |= OFFLINE
            else:
                kwargs |= self._precision(dict(config), callbacks)
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, RuntimeError) as error:  # of an argument of the Trainer's, or two callbacks with one state
            raise ConfigError(str(error)) from error

    def _precision(self, config: Mapping[str, Any], callbacks: Sequence[Callback]) -> dict[str, str | None]:
        """What the trainer gets for `precision`; reports get the reason."""
        choice = choose_precision(config, callbacks, self._get(self.config, "ckpt_path"))
        for callback in callbacks:
            if choice is not None and isinstance(callback, RunReport):
                callback.precision_reason = choice.reason
        return {"precision": None if choice is None else choice.used}


def default_callbacks(given: Sequence[Callback], *, progress_bar: bool) -> list[Callback]:
    """The callbacks that every run has, less those that `given` already provides."""
    defaults: list[Callback] = []
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in given):
        defaults.append(PruningProgressBar())
    for kind in (RunReport, RandomState, DomainCounts):
        if not any(isinstance(callback, kind) for callback in given):
            defaults.append(kind())
    return defaults


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
