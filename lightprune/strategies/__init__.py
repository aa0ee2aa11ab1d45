"""How a Lightning strategy trains while the model changes under it: one engine for each kind of strategy."""

import lightning as L

from lightprune.errors import ConfigError
from lightprune.strategies.base import Engine
from lightprune.strategies.ddp import DDP
from lightprune.strategies.deepspeed import DeepSpeed
from lightprune.strategies.exact import CPUDeepSpeedStrategy, ExactDeepSpeedStrategy
from lightprune.strategies.single_device import SingleDevice

# A subclass of a Lightning strategy before the class that it derives from.
ENGINES: tuple[type[Engine], ...] = (DeepSpeed, DDP, SingleDevice)


def engine_of(trainer: L.Trainer) -> Engine:
    """The engine of a trainer's strategy.

    Raises:
        ConfigError: lightprune does not support the strategy.
    """
    for engine in ENGINES:
        if isinstance(trainer.strategy, engine.supports):
            return engine(trainer)
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


__all__ = ["CPUDeepSpeedStrategy", "Engine", "ExactDeepSpeedStrategy", "engine_of"]
