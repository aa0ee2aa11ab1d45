"""Recovery: how what is left trains after the last cut."""

from lightprune.recovery.learning_rate import Recovery
from lightprune.recovery.lora import LoRARecovery

__all__ = ["LoRARecovery", "Recovery"]
