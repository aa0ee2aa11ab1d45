"""Moments and lengths of a run as a user writes them: optimizer steps, or a share of the run such as "75%"."""

import math
import re
from collections.abc import Iterable

from lightprune.errors import ConfigError

Steps = int | str
"""A number of optimizer steps, or a share of `trainer.max_steps`: `96` or `"75%"`."""

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def resolve_steps(owner: object, keys: Iterable[str], max_steps: int) -> None:
    """Turn those settings of `owner` that are shares of the run into optimizer steps, in place.

    Args:
        owner: whose settings they are.
        keys: the names of the settings.
        max_steps: `trainer.max_steps`.

    Raises:
        ConfigError: see `share_in_steps`.
    """
    for key in keys:
        value = getattr(owner, key)
        if isinstance(value, str):
            setattr(owner, key, share_in_steps(owner, key, value, max_steps))


def share_in_steps(owner: object, key: str, value: str, max_steps: int) -> int:
    """A share of the run in optimizer steps, rounded; never 0, unless the share is.

    Args:
        owner: whose setting it is.
        key: the setting's name.
        value: the share, such as "75%".
        max_steps: `trainer.max_steps`; -1 where the run has no fixed length.

    Raises:
        ConfigError: it is no share between 0% and 100%, or the run's length is not known before it begins.
    """
    name = f"{type(owner).__name__}.{key}"
    found = _SHARE.fullmatch(value)
    if found is None or float(found[1]) > 100:
        raise ConfigError(
            f"{name} is {value!r}: it must be a whole number of optimizer steps, or a share of the run from 0% to "
            "100%, such as 75%."
        )
    if max_steps < 0:
        raise ConfigError(
            f"{name} is {value!r}, a share of trainer.max_steps, which is not set: set trainer.max_steps, or give "
            f"`{key}` in optimizer steps."
        )
    share = float(found[1]) / 100
    return max(math.floor(share * max_steps + 0.5), 1 if share else 0)
