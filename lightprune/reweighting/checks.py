"""What `DomainReweighting` refuses before the first step, in one sentence each."""

import math
from collections.abc import Mapping
from typing import Protocol

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightprune.errors import ConfigError, check_choice, check_number, is_finite
from lightprune.integrations.lightning import data_of
from lightprune.reweighting.mixer import RULES
from lightprune.reweighting.references import FITS_FROM, POINTS_FROM
from lightprune.reweighting.robust import Array
from lightprune.reweighting.scaling_law import MIN_POINTS


class ReweightingSettings(Protocol):
    """The settings of `DomainReweighting`, as the checks read them."""

    @property
    def rule(self) -> str: ...

    @property
    def losses(self) -> str: ...

    @property
    def reference(self) -> str | Mapping[str, float]: ...

    @property
    def radius(self) -> float: ...

    @property
    def floor(self) -> float: ...

    @property
    def dynamic_ratio(self) -> bool: ...

    @property
    def every(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int | None: ...


def check_settings(settings: ReweightingSettings) -> None:
    """Refuse values that no run could have.

    Raises:
        ConfigError: it names the value, what is allowed, and the key.
    """
    check_choice(settings, "rule", settings.rule, RULES)
    check_choice(settings, "losses", settings.losses, ("training", "validation"))
    if not isinstance(settings.reference, Mapping):
        sources = ("source", "dynamic")
        check_choice(settings, "reference", settings.reference, sources, " or a mapping of domains to losses")
    check_number(settings, "radius", settings.radius, above=0)
    check_number(settings, "floor", settings.floor, least=0, below=1)
    check_number(settings, "every", settings.every, whole=True, least=1)
    check_number(settings, "start", settings.start, whole=True, least=0)
    check_number(settings, "stop", settings.stop, whole=True, optional=True)
    if settings.stop is not None and settings.stop <= settings.start:
        raise ConfigError(
            f"DomainReweighting.stop is {settings.stop}: it must be null or above start={settings.start}."
        )
    if settings.dynamic_ratio and settings.rule != "robust":
        raise ConfigError(
            f"DomainReweighting.dynamic_ratio moves the ratio of rule='robust', and rule is {settings.rule!r}: set one "
            "of the two accordingly."
        )


def check_data(settings: ReweightingSettings, trainer: L.Trainer) -> None:
    """Refuse a run whose data module or validation cannot give what the settings need.

    Raises:
        ConfigError: it says what is missing.
    """
    data = data_of(trainer)
    missing = [name for name in ("domain_names", "weights", "set_weights") if not hasattr(data, name)]
    if missing:
        found = "there is none" if data is None else f"{type(data).__name__} has no `{missing[0]}`"
        raise ConfigError(
            "DomainReweighting steers a data module with `domain_names`, `weights` and `set_weights`, and "
            f"{found}: fit with datamodule=TextDataModule(...), or give yours these three."
        )
    if isinstance(settings.reference, Mapping):
        _check_mapping(settings.reference, list(data.domain_names))
    check_validation(settings, trainer.enable_validation)


def check_validation(settings: ReweightingSettings, there_is: bool) -> None:
    """Refuse settings that need validation in a run without.

    Args:
        settings: of the callback.
        there_is: whether the run validates.

    Raises:
        ConfigError: it says what is missing.
    """
    wanted = "losses='validation'" if settings.losses == "validation" else "reference='source'"
    if (settings.losses == "validation" or settings.reference == "source") and not there_is:
        raise ConfigError(
            f"DomainReweighting.{wanted} needs validation, and this run has none: give it validation data and a "
            "validation_step, set trainer.limit_val_batches above 0, or set losses='training' with reference='dynamic' "
            "or a mapping of domains to losses."
        )


def initial_ratio(weights: Mapping[str, float], domains: list[str]) -> Array:
    """The data module's weights as a ratio [D].

    Raises:
        ConfigError: they name other domains than `domain_names`, or are no mixture.
    """
    if set(weights) != set(domains) or not all(math.isfinite(w) and w >= 0 for w in weights.values()):
        raise ConfigError(
            f"The data module's `weights` are {dict(weights)}, but must be a number of at least 0 for each of its "
            f"`domain_names`: {', '.join(domains)}."
        )
    ratio = np.array([weights[name] for name in domains], dtype=np.float64)
    if np.count_nonzero(ratio) < 2:
        raise ConfigError(
            f"DomainReweighting needs two domains with a weight above 0, and data.weights are {dict(weights)}: raise "
            "the weight of another domain, or leave DomainReweighting out."
        )
    return np.asarray(ratio / ratio.sum())


def warn_of_equal_shares(ratio: Array) -> None:
    """Warn that a dynamic ratio never moves if all shares of the ratio [D] are equal."""
    used = ratio[ratio > 0]
    if np.allclose(used, used[0]):
        rank_zero_warn(
            "DomainReweighting.dynamic_ratio is true, and all domains begin with the same share: the ratio stays "
            "between the least and the greatest of them, so it will not move. Give data.weights that differ, or set "
            "it to false."
        )


def warn_of_rare_updates(settings: ReweightingSettings, trainer: L.Trainer, end: float) -> None:
    """Warn that the first update would come after the end, `end`, of the run or of the callback's window."""
    last = end - 1 if end == settings.stop else end  # the step of `stop` is not its own any more
    if settings.losses == "training" and last - settings.start < settings.every:
        rank_zero_warn(
            f"DomainReweighting.every is {settings.every}, and from its start it has {last - settings.start:.0f} "
            "steps: there will be no update. Set it to less."
        )
    if settings.losses == "validation" and (trainer.val_check_batch or 0) > end * trainer.accumulate_grad_batches:
        rank_zero_warn(
            "DomainReweighting.losses is 'validation', and trainer.val_check_interval is "
            f"{trainer.val_check_interval}, beyond the end of the run: no weights move but at cuts that validate. Set "
            "it to the batches between two updates."
        )


def check_length(settings: ReweightingSettings, end: float) -> None:
    """Refuse a run whose end is not known where shares of its steps count, or that is too short for a fit.

    Args:
        settings: of the callback.
        end: the step at which the run, or the callback's window, ends.

    Raises:
        ConfigError: it says which key to change.
    """
    dynamic = settings.reference == "dynamic"
    if (dynamic or settings.dynamic_ratio) and math.isinf(end):
        wanted = "reference='dynamic'" if dynamic else "dynamic_ratio=True"
        raise ConfigError(
            f"DomainReweighting.{wanted} counts in shares of the run, whose length is not known: set trainer.max_steps "
            "or DomainReweighting.stop."
        )
    if settings.start >= end:
        raise ConfigError(
            f"DomainReweighting.start is {settings.start}, and the run ends at step {end:.0f}: set it to less."
        )
    steps = end - settings.start
    if dynamic and settings.losses == "training" and steps * (1 - POINTS_FROM) // settings.every < MIN_POINTS + 1:
        most = int(steps * (1 - POINTS_FROM)) // (MIN_POINTS + 1)
        better = max(int(steps * (FITS_FROM - POINTS_FROM)) // MIN_POINTS, 1)
        instead = f"set every to at most {most}, better {better}, or " if most else ""
        raise ConfigError(
            f"DomainReweighting.reference='dynamic' fits its first curve to {MIN_POINTS} updates, and {steps:.0f} "
            f"steps have too few with every={settings.every}: {instead}give the references as a mapping."
        )


def check_validated(losses: Array, ratio: Array, domains: list[str]) -> None:
    """Refuse validation data that lacks a domain which trains.

    Raises:
        ConfigError: it names the domain.
    """
    lacking = [name for name, loss, share in zip(domains, losses, ratio, strict=True) if share and np.isnan(loss)]
    if lacking:
        raise ConfigError(
            f"DomainReweighting needs a validation loss of each domain that trains, and {', '.join(lacking)} got none: "
            "give validation data of it, raise trainer.limit_val_batches, or set losses='training' with "
            "reference='dynamic' or a mapping of domains to losses."
        )


def _check_mapping(reference: Mapping[str, float], domains: list[str]) -> None:
    names = f"the data module has: {', '.join(domains)}"
    for name, loss in reference.items():
        if name not in domains:
            raise ConfigError(f"DomainReweighting.reference names {name!r}, but {names}.")
        if not is_finite(loss) or loss < 0:
            raise ConfigError(f"DomainReweighting.reference.{name} is {loss}: it must be a loss in nats per token.")
    for name in domains:
        if name not in reference:
            raise ConfigError(f"DomainReweighting.reference has no loss for {name!r}, and {names}.")
