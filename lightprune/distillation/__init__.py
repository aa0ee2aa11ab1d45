"""Distillation: a frozen model teaches the one that is pruned, in the same fit."""

from lightprune.distillation.callback import Distillation
from lightprune.distillation.kl import divergence

__all__ = ["Distillation", "divergence"]
