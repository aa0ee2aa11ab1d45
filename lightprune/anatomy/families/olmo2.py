"""OLMo 2: norms after attention and MLP, none before them; query and key norms run over all heads together."""

from lightprune.anatomy.axes import HEADS, HIDDEN, KV_GROUPS
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.families.llama import ATTENTION, GATED_MLP, STEM

OLMO2 = Family(
    model_types=("olmo2",),
    weights={
        **ATTENTION,
        **GATED_MLP,
        "self_attn.q_norm": (HEADS,),
        "self_attn.k_norm": (KV_GROUPS,),
        "post_attention_layernorm": (HIDDEN,),
        "post_feedforward_layernorm": (HIDDEN,),
    },
    writers={"post_attention_layernorm": LINEAR, "post_feedforward_layernorm": LINEAR},
    stem=STEM,
)
