"""What lightprune's command line asks of LightningCLI, and of argparse below it, beyond their public names."""

from typing import Any

# Lightning 2.6.6: `_PRECISION_INPUT` is the type of the Trainer's argument. Without it "auto" could not be added to it.
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

PrecisionInput = _PRECISION_INPUT


class OpenCLI(LightningCLI):
    """LightningCLI with public methods for some of its private ones."""

    def before_checkpoint(self, path: str) -> None:
        """Called with `ckpt_path`, where the config or the command line gives one, before anything reads it."""

    def setting(self, config: Any, key: str) -> Any:
        """A setting of the subcommand that runs."""
        # Lightning 2.6.6: `_get` looks below the subcommand. Without it its name would have to be put in front here.
        return self._get(config, key)

    def parser_of(self, verb: str) -> LightningArgumentParser:
        """The parser of a subcommand."""
        # Lightning 2.6.6: `_subcommand_parsers` holds them. Without it mistakes could not name a command's settings.
        parser: LightningArgumentParser = self._subcommand_parsers[verb]
        return parser

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6.6: `_parse_ckpt_path` reads the hyperparameters in a checkpoint before there is a trainer.
        # Without it a checkpoint that is not there would be a traceback.
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path:
            self.before_checkpoint(str(path))
        super()._parse_ckpt_path()


def make_flag(parser: LightningArgumentParser, option: str) -> None:
    """Let a boolean option stand alone, as a flag does, or have a value."""
    # argparse of Python 3.10 to 3.13: `_option_string_actions`. Without it `--overwrite` would need a value.
    action = parser._option_string_actions[option]
    action.nargs, action.const = "?", True
