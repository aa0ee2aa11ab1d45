"""Text domains, packed into token blocks, as a weighted mixture whose weights can change while it runs."""

from lightprune.data.blocks import BlockDataset
from lightprune.data.counts import DomainCounts
from lightprune.data.loader import MixtureLoader
from lightprune.data.mixture import MixtureSampler
from lightprune.data.module import TextDataModule
from lightprune.data.sources import Source

__all__ = ["BlockDataset", "DomainCounts", "MixtureLoader", "MixtureSampler", "Source", "TextDataModule"]
