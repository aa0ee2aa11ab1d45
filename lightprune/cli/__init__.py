"""`lightprune fit | validate | test | plan | export`: LightningCLI with pruning's verbs.

Only `main` is imported with the package: help and mistakes are answered without torch (see `entry`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightprune.cli.entry import main

if TYPE_CHECKING:
    from lightprune.cli.app import LightpruneCLI, default_callbacks
    from lightprune.cli.trainer import PruningTrainer

__all__ = ["LightpruneCLI", "PruningTrainer", "default_callbacks", "main"]


def __getattr__(name: str) -> Any:
    """Import the rest of the command line when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "trainer" if name == "PruningTrainer" else "app"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
