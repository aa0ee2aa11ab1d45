"""A package that somebody else wrote: a family, a selector, a regularizer and a strategy, by public names alone."""

import lightprune as lp
from lightprune.strategies import register_adapter
from tests.stranger.family import STABLELM
from tests.stranger.regularizer import ShrinkChannels
from tests.stranger.selector import RangeSelector
from tests.stranger.strategy import PlainAdapter, PlainStrategy

lp.register_family(STABLELM)
register_adapter(PlainAdapter)

__all__ = ["STABLELM", "PlainAdapter", "PlainStrategy", "RangeSelector", "ShrinkChannels"]
