"""What the command line answers before it imports anything heavy: help, the version, mistakes in commands and files."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from lightprune import __version__
from lightprune.cli import shipped
from lightprune.errors import ConfigError

VERBS = {
    "fit": "train, and prune on the way",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "plan": "print what a config would cut and when; trains nothing",
    "export": "write the model of a checkpoint as a Hugging Face directory",
    "generate": "let the model write the text that a run is to train on",
}

# Commands that take no config.
_ALONE = ("benchmark", "configs")

HELP = f"""\
usage: lightprune COMMAND [--config FILE ...] [--KEY VALUE ...]

Make a Hugging Face causal language model smaller while it trains.

commands:
{chr(10).join(f"  {verb:<32}{does}" for verb, does in VERBS.items())}
  benchmark MODEL ...             measure models side by side: first token, tokens a second, against their sizes
  configs                         list, print or copy the configs that come with lightprune

options:
  --config FILE                   a YAML file of settings, or the name of one that comes with lightprune, such as
                                  methods/trsp.yaml; later files override earlier ones
  --KEY VALUE                     set one of them, such as --trainer.max_steps 100
  --callback.NAME.ARGUMENT VALUE  set an argument of one callback, such as --callback.StructuredCut.at 64
  --print_config                  print the settings that result, and stop
  --version                       print the version, and stop
  --help                          print this, and stop

`lightprune COMMAND --help` lists all settings of a command.
"""


def answer(arguments: Sequence[str]) -> str | None:
    """What to print for arguments that ask for no more than text; None if they ask for more.

    Raises:
        ConfigError: there is no such command, or a config file that is missing or not YAML.
    """
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        return HELP
    if first == "--version":
        return f"lightprune {__version__}\n"
    if first == "configs":
        return shipped.answer(arguments[1:])
    if first == "benchmark":
        return None
    if not first.startswith("-"):
        _check_verbs(arguments)
    for file in config_files(arguments):
        _check_config(file)
    return None


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """The values of `--config`, in their order."""
    for index, argument in enumerate(arguments):
        if argument in ("-c", "--config"):
            if index + 1 == len(arguments):
                raise ConfigError(f"{argument} needs the path of a YAML file.")
            yield arguments[index + 1]
        elif argument.startswith("--config="):
            yield argument.removeprefix("--config=")


def suggestion(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the known name that is nearest, or nothing."""
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_verbs(arguments: Sequence[str]) -> None:
    names = ", ".join((*VERBS, *_ALONE))
    if not arguments:
        raise ConfigError(f"lightprune needs a command: one of {names} (see lightprune --help).")
    if arguments[0] not in VERBS:
        near = suggestion(arguments[0], (*VERBS, *_ALONE))
        raise ConfigError(f"{arguments[0]!r} is not a command of lightprune{near}: it must be one of {names}.")
    if len(arguments) > 1 and arguments[1] in VERBS:
        raise ConfigError(
            f"lightprune runs one command at a time: give {arguments[0]!r} or {arguments[1]!r}, not both."
        )


def _check_config(file: str) -> None:
    """Refuse a file that is not there or is not a mapping in YAML. What is no local file is left to the parser."""
    if "://" in file or file == "-" or file.lstrip().startswith("{"):
        return
    try:
        document = yaml.compose(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"The config file {file!r} does not exist, and no config of that name comes with lightprune"
            f"{shipped.near(file)}: correct it; `lightprune configs` lists those that do."
        ) from error
    except OSError as error:
        raise ConfigError(f"The config file {file!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config file {file!r} is not text in UTF-8: it must be YAML.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The config file {file!r} is not valid YAML{_place(error)}.") from error
    if not isinstance(document, yaml.MappingNode):
        what = "is empty" if document is None else "does not hold settings by name"
        raise ConfigError(f"The config file {file!r} {what}: it must have keys such as `trainer`, `model` and `data`.")


def _place(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
