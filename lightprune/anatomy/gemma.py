"""Gemma 2 and Gemma 3 (text): norms on both sides of attention and MLP, embeddings scaled by sqrt(hidden).

Their norms multiply by 1 + weight.
"""

from lightprune.anatomy.axes import HIDDEN
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.llama import ATTENTION, GATED_MLP, PRE_NORMS, STEM
from lightprune.anatomy.predicates import heads_divide_hidden

_WEIGHTS = {
    **PRE_NORMS,
    **ATTENTION,
    **GATED_MLP,
    "pre_feedforward_layernorm": (HIDDEN,),
    "post_feedforward_layernorm": (HIDDEN,),
}
_WRITERS = {"post_attention_layernorm": LINEAR, "post_feedforward_layernorm": LINEAR}

GEMMA2 = Family(
    model_types=("gemma2",),
    weights=_WEIGHTS,
    writers=_WRITERS,
    norm_offset=1.0,
    stem=STEM,
    predicates=(heads_divide_hidden,),
)
GEMMA3 = Family(
    model_types=("gemma3_text",),
    weights=_WEIGHTS,
    writers=_WRITERS,
    norm_offset=1.0,
    stem=STEM,
    predicates=(heads_divide_hidden,),
    layer_index=("self_attn.layer_idx", "layer_idx"),
)
