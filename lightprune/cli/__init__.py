"""`lightprune fit | validate | test | plan | export`: LightningCLI with pruning's verbs."""

from lightprune.cli.app import LightpruneCLI, default_callbacks, main
from lightprune.cli.trainer import PruningTrainer

__all__ = ["LightpruneCLI", "PruningTrainer", "default_callbacks", "main"]
