"""Runs that say nothing, for only their numbers count."""

import logging
import warnings
from typing import Any

# What a trainer takes.
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def be_quiet() -> None:
    """Let neither warnings nor Lightning's log come through."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
