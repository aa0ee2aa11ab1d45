"""Starcoder 2 and Arcee: Llama's attention before an MLP of two projections without a gate."""

from dataclasses import replace

from lightprune.anatomy.axes import CHANNELS, HIDDEN
from lightprune.anatomy.base import LINEAR
from lightprune.anatomy.families.llama import ATTENTION, LLAMA, PRE_NORMS

STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    weights={**PRE_NORMS, **ATTENTION, "mlp.c_fc": (CHANNELS, HIDDEN), "mlp.c_proj": (HIDDEN, CHANNELS)},
    writers={"self_attn.o_proj": LINEAR, "mlp.c_proj": LINEAR},
)
ARCEE = replace(
    LLAMA,
    model_types=("arcee",),
    weights={**PRE_NORMS, **ATTENTION, "mlp.up_proj": (CHANNELS, HIDDEN), "mlp.down_proj": (HIDDEN, CHANNELS)},
)
