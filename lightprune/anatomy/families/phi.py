"""Phi (1, 1.5, 2): parallel residual behind one norm, a head with a bias."""

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.shape_rules import query_norm_fits

PHI = Family(
    model_types=("phi",),
    weights={
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS, HIDDEN),
        "self_attn.k_proj": (KV_GROUPS, HIDDEN),
        "self_attn.v_proj": (KV_GROUPS, HIDDEN),
        "self_attn.dense": (HIDDEN, HEADS),
        "mlp.fc1": (CHANNELS, HIDDEN),
        "mlp.fc2": (HIDDEN, CHANNELS),
    },
    writers={"self_attn.dense": LINEAR, "mlp.fc2": LINEAR},
    stem={"model.embed_tokens": (None, HIDDEN), "model.final_layernorm": (HIDDEN,), "lm_head": (None, HIDDEN)},
    predicates=(query_norm_fits,),
)
