"""How a Lightning strategy is made whole after surgery: one file for each strategy."""

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lightprune.errors import ConfigError
from lightprune.strategies.single_device import cut


def check(strategy: Strategy) -> None:
    """Refuse a strategy under which the model cannot be cut.

    Raises:
        ConfigError: lightprune does not support `strategy`.
    """
    if not isinstance(strategy, SingleDeviceStrategy):
        raise ConfigError(
            f"lightprune cannot prune under {type(strategy).__name__}: it supports a single device; "
            "set trainer.devices=1 and trainer.strategy=auto."
        )


__all__ = ["check", "cut"]
