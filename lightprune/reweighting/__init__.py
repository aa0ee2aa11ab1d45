"""Domain reweighting: per-domain losses become the weights of the data mixture."""

from lightprune.reweighting.callback import DomainReweighting

__all__ = ["DomainReweighting"]
