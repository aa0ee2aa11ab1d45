"""OPT: a decoder without an encoder, learned positions."""

from lightprune.anatomy.base import Family

OPT = Family(model_types=("opt",), layers="model.decoder.layers")
