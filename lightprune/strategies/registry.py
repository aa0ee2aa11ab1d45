"""Which adapter works for which Lightning strategy: ours, and those that others register."""

import lightning as L

from lightprune.errors import ConfigError
from lightprune.strategies.base import StrategyAdapter
from lightprune.strategies.ddp import DDP
from lightprune.strategies.deepspeed import DeepSpeed
from lightprune.strategies.single_device import SingleDevice

# A subclass of a Lightning strategy comes before the class that it derives from.
_ADAPTERS: list[type[StrategyAdapter]] = [DeepSpeed, DDP, SingleDevice]


def register_adapter(adapter: type[StrategyAdapter]) -> type[StrategyAdapter]:
    """Make a strategy adapter known to lightprune, in this process; usable as a class decorator.

    The adapter that was registered last is asked first whether it `supports` a trainer's strategy.

    Returns:
        The adapter itself.
    """
    _ADAPTERS.insert(0, adapter)
    return adapter


def adapter_of(trainer: L.Trainer) -> StrategyAdapter:
    """The adapter for a trainer's strategy.

    Raises:
        ConfigError: no adapter supports the strategy.
    """
    for adapter in _ADAPTERS:
        if isinstance(trainer.strategy, adapter.supports):
            return adapter(trainer)
    if type(trainer).__module__.startswith("pytorch_lightning"):
        raise ConfigError(
            "This trainer is one of the package pytorch_lightning: import lightning.pytorch in its place, which is the "
            "same, for the trainer, the module and the callbacks."
        )
    raise ConfigError(
        f"lightprune cannot prune under {type(trainer.strategy).__name__}: set trainer.strategy to auto (one device), "
        "ddp (the model fits on each device) or lightprune.strategies.ExactDeepSpeedStrategy with stage 1, 2 or 3 (its "
        "training does not)."
    )
