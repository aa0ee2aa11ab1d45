"""Gemma 2 and Gemma 3 (text): norms on both sides of attention and MLP, embeddings scaled by sqrt(hidden).

Their norms multiply by 1 + weight.
"""

from dataclasses import replace

from lightprune.anatomy.axes import HIDDEN
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.families.llama import ATTENTION, GATED_MLP, PRE_NORMS, STEM
from lightprune.anatomy.shape_rules import heads_divide_hidden

GEMMA2 = Family(
    model_types=("gemma2",),
    weights={
        **PRE_NORMS,
        **ATTENTION,
        **GATED_MLP,
        "pre_feedforward_layernorm": (HIDDEN,),
        "post_feedforward_layernorm": (HIDDEN,),
    },
    writers={"post_attention_layernorm": LINEAR, "post_feedforward_layernorm": LINEAR},
    norm_offset=1.0,
    stem=STEM,
    predicates=(heads_divide_hidden,),
)
GEMMA3 = replace(
    GEMMA2,
    model_types=("gemma3_text",),
    layer_index=("self_attn.layer_idx", "layer_idx"),
)
