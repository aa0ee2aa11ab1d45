"""Phi 3 and 4: Llama with fused projections."""

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS
from lightprune.anatomy.base import Family
from lightprune.anatomy.families.llama import PRE_NORMS, STEM
from lightprune.anatomy.shape_rules import long_rope_fits

PHI3 = Family(
    model_types=("phi3",),
    weights={
        **PRE_NORMS,
        "self_attn.qkv_proj": (HEADS + KV_GROUPS + KV_GROUPS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS),
        "mlp.gate_up_proj": (CHANNELS + CHANNELS, HIDDEN),
        "mlp.down_proj": (HIDDEN, CHANNELS),
    },
    stem=STEM,
    predicates=(long_rope_fits,),
)
