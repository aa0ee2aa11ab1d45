"""GPT-NeoX and Pythia: query, key and value of a head lie together in one projection."""

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, Run
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.shape_rules import heads_fill_hidden

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    weights={
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "attention.query_key_value": ((Run("heads", vectors=3),), HIDDEN),
        "attention.dense": (HIDDEN, HEADS),
        "mlp.dense_h_to_4h": (CHANNELS, HIDDEN),
        "mlp.dense_4h_to_h": (HIDDEN, CHANNELS),
    },
    writers={"attention.dense": LINEAR, "mlp.dense_4h_to_h": LINEAR},
    stem={
        "gpt_neox.embed_in": (None, HIDDEN),
        "gpt_neox.final_layer_norm": (HIDDEN,),
        "lm_head": (None, HIDDEN),
    },
    layers="gpt_neox.layers",
    head_dim_field=None,
    predicates=(heads_fill_hidden,),
    layer_index=("attention.layer_idx",),
)
