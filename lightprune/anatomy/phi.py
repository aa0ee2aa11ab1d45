"""Phi (1, 1.5, 2): parallel residual, otherwise Llama's places."""

from lightprune.anatomy.base import Family

PHI = Family(model_types=("phi",), layers="model.layers")
