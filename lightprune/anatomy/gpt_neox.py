"""GPT-NeoX and Pythia."""

from lightprune.anatomy.base import Family

GPT_NEOX = Family(model_types=("gpt_neox",), layers="gpt_neox.layers", layer_index=("attention.layer_idx",))
