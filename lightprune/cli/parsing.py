"""What lightprune needs from jsonargparse beyond a plain parse."""

import json
import re
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from packaging.version import Version

import lightprune
from lightprune.cli.overrides import CallbackConfig


def parse(parser: ArgumentParser, arguments: Sequence[str], **options: Any) -> Namespace:
    """Parse; a class of lightprune may be named without its module, and the parser knows only imported classes.

    Raises:
        ArgumentError: the arguments or the config files are wrong.
    """
    try:
        return parser.parse_args(arguments, **options)
    except ArgumentError as error:
        if "Expected a dot import path string" not in str(error):
            raise
        for name in (*lightprune.__all__, "data", "strategies"):
            getattr(lightprune, name)
        return parser.parse_args(arguments, **options)


def read_callbacks(parser: ArgumentParser, arguments: Sequence[str]) -> list[CallbackConfig]:
    """The callbacks of the config that results from the arguments, with all of their `init_args`.

    An argument that a callback needs may be missing: it may be about to be set.

    Raises:
        ArgumentError: the arguments or the config files are wrong.
    """
    plain = [argument for argument in arguments if not argument.startswith("--print_config")]
    try:
        config = parse(parser, plain, _skip_validation=True)  # private: nothing public reads what is not complete
    except (TypeError, ValueError):  # an older jsonargparse, which names it otherwise
        config = parse(parser, plain)
    callbacks = json.loads(_dump(parser, config))[config.subcommand]["trainer"].get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def guess_callbacks(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The class paths of the config's callbacks, if it can be read without the options that address them."""
    plain = [argument for argument in arguments if not re.match(r"--trainer\.callbacks\.\S+=", argument)]
    for index in reversed(range(len(plain))):
        if plain[index].startswith("--trainer.callbacks."):
            del plain[index : index + 2]
    if len(plain) == len(arguments):
        return []
    try:
        return [callback["class_path"] for callback in read_callbacks(parser, plain)]
    except ArgumentError:
        return []


def _dump(parser: ArgumentParser, config: Namespace) -> str:
    """As JSON, unchecked and with its nulls, which jsonargparse called "none" before 4.49."""
    nulls = "skip_unset" if Version(version("jsonargparse")) >= Version("4.49") else "skip_none"
    return str(parser.dump(config, format="json", skip_validation=True, **{nulls: False}))
