"""`--callback.NAME.ARGUMENT VALUE`: one argument of one callback of the config, set from the command line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightprune.cli.early import suggestion
from lightprune.errors import ConfigError

PREFIX = "--callback."
_HOW = "write --callback.NAME.ARGUMENT VALUE, such as --callback.StructuredCut.at 64"

CallbackConfig = dict[str, Any]
"""A callback as the config has it: its `class_path` and its `init_args`."""


@dataclass(frozen=True)
class Override:
    """One such option.

    Attributes:
        option: the option as it was written, without its value.
        name: the callback's class.
        index: which of the callbacks of that class, from 0; None if there is only one.
        path: the argument, and the keys inside of it.
        value: what to set it to, for the parser to read as the argument's type.
    """

    option: str
    name: str
    index: int | None
    path: tuple[str, ...]
    value: str


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Take these options out of the arguments.

    Args:
        arguments: those of the command line.

    Returns:
        The arguments that are left, and the overrides in their order.

    Raises:
        ConfigError: an option has no value, or names no argument.
    """
    rest: list[str] = []
    overrides: list[Override] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        option, equals, text = argument.partition("=")
        if not equals:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{option} has no value: {_HOW}.")
            text = value
        overrides.append(_override(option, text))
    return rest, overrides


def apply_overrides(
    callbacks: Sequence[CallbackConfig], overrides: Sequence[Override], defaults: dict[str, str]
) -> list[CallbackConfig]:
    """Set the arguments in a list of callbacks.

    Args:
        callbacks: those of the config; they are changed.
        overrides: what to set.
        defaults: the classes, by name, that a run adds where the config has none: they are added in front, as there.

    Raises:
        ConfigError: there is no such callback, or there are several.
    """
    added: list[CallbackConfig] = []
    for override in overrides:
        known = [*added, *callbacks]
        if override.name in defaults and override.name not in map(class_name, known):
            added.append({"class_path": defaults[override.name]})
            known = added
        *parents, last = override.path
        settings = _find(known, override).setdefault("init_args", {})
        for key in parents:
            if not isinstance(settings.get(key), dict):
                settings[key] = {}
            settings = settings[key]
        settings[last] = override.value
    return [*added, *callbacks]


def class_name(callback: CallbackConfig) -> str:
    """The name of a callback's class, without its module."""
    return str(callback["class_path"]).rpartition(".")[2]


def _override(option: str, value: str) -> Override:
    match = re.fullmatch(r"(?P<name>[^.]+)(?:\.(?P<index>\d+))?\.(?P<path>[^.]+(?:\.[^.]+)*)", option[len(PREFIX) :])
    if match is None:
        raise ConfigError(f"{option} names no argument of a callback: {_HOW}.")
    index = None if match["index"] is None else int(match["index"])
    return Override(option, match["name"], index, tuple(match["path"].split(".")), value)


def _find(callbacks: Sequence[CallbackConfig], override: Override) -> CallbackConfig:
    """The callback that an override means."""
    names = list(dict.fromkeys(map(class_name, callbacks)))
    found = [callback for callback in callbacks if class_name(callback) == override.name]
    if not found:
        there = f"it has {', '.join(names)}" if names else "it has no callbacks"
        near = suggestion(override.name, names)
        raise ConfigError(f"{override.option}: the config has no callback {override.name!r}{near}: {there}.")
    if override.index is None and len(found) > 1:
        rest = ".".join(override.path)
        first = f"{PREFIX}{override.name}.0.{rest}"
        raise ConfigError(
            f"{override.option}: the config has {len(found)} callbacks {override.name}: say which one by its number, "
            f"from {first} to {PREFIX}{override.name}.{len(found) - 1}.{rest}."
        )
    if override.index is not None and override.index >= len(found):
        raise ConfigError(
            f"{override.option}: the config has {len(found)} of {override.name}, and the number counts from 0: it must "
            f"be at most {len(found) - 1}."
        )
    return found[override.index or 0]
