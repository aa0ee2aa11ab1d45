"""StableLM, which lightprune does not ship: LayerNorms with biases, and rotary embeddings on a part of each head."""

from transformers import PretrainedConfig

import lightprune as lp
from lightprune.anatomy import CHANNELS, HEADS, HIDDEN, KV_GROUPS, Shape


def heads_fill_hidden(shape: Shape, config: PretrainedConfig) -> str | None:
    """StableLmConfig has no head_dim: the class divides the hidden dimensions among the heads."""
    if shape.heads * shape.head_dim == shape.hidden:
        return None
    return f"{shape.heads} heads of {shape.head_dim} dimensions do not fill {shape.hidden} hidden dimensions"


STABLELM = lp.Family(
    model_types=("stablelm",),
    weights={
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS, HIDDEN),
        "self_attn.k_proj": (KV_GROUPS, HIDDEN),
        "self_attn.v_proj": (KV_GROUPS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (CHANNELS, HIDDEN),
        "mlp.up_proj": (CHANNELS, HIDDEN),
        "mlp.down_proj": (HIDDEN, CHANNELS),
    },
    stem={"model.embed_tokens": (None, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (None, HIDDEN)},
    head_dim_field=None,
    predicates=(heads_fill_hidden,),
)
