"""What lightprune raises when a run cannot work as it is configured, and the checks of single values that raise it."""

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard


class ConfigError(ValueError):
    """A configuration that cannot work: one sentence with the value, the allowed ones and the key to change."""


class ExportError(RuntimeError):
    """A trained model that could not be exported under its name: one sentence that says why, and where it is now."""


def check_choice(owner: object, key: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    """Refuse a value that is none of those allowed.

    Args:
        owner: whose setting it is, an object or its name.
        key: the setting's name.
        value: what it was set to.
        allowed: usually `typing.get_args` of a `Literal`.
        more: words for what else is allowed.

    Raises:
        ConfigError: it names all of these.
    """
    if value not in allowed:
        raise ConfigError(f"{_name(owner)}.{key} is {value!r}: it must be one of {', '.join(allowed)}{more}.")


def check_number(
    owner: object,
    key: str,
    value: Any,
    *,
    whole: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Refuse what is no finite number (booleans and strings are none), or lies outside its bounds.

    Args:
        owner: whose setting it is, an object or its name.
        key: the setting's name.
        value: what it was set to.
        whole: it must be a whole number.
        least: it may not be less than this.
        above: it must be more than this.
        most: it may not be more than this.
        below: it must be less than this.
        optional: it may be None.

    Raises:
        ConfigError: it names the value, what is allowed, and the key.
    """
    if value is None and optional:
        return
    bounds = [
        (words, bound, holds)
        for words, bound, holds in (
            ("at least", least, operator.ge),
            ("above", above, operator.gt),
            ("at most", most, operator.le),
            ("below", below, operator.lt),
        )
        if bound is not None
    ]
    is_number = is_whole(value) if whole else is_finite(value)
    if is_number and all(holds(value, bound) for _, bound, holds in bounds):
        return
    kind = "" if is_number else "a whole number" if whole else "a finite number"
    within = " and ".join(f"{words} {bound}" for words, bound, _ in bounds)
    allowed = ", ".join(filter(None, (kind, within, "or null" if optional else "")))
    raise ConfigError(f"{_name(owner)}.{key} is {value!r}: it must be {allowed}.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; booleans are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and neither NaN nor infinite; booleans are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
