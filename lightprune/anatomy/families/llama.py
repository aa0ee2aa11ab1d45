"""Llama and the families that share its layout, among them Mistral, Qwen, SmolLM3, Granite and ERNIE 4.5."""

from collections.abc import Mapping

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS
from lightprune.anatomy.base import Axes, Family

ATTENTION: Mapping[str, Axes] = {
    "self_attn.q_proj": (HEADS, HIDDEN),
    "self_attn.k_proj": (KV_GROUPS, HIDDEN),
    "self_attn.v_proj": (KV_GROUPS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS),
}
GATED_MLP: Mapping[str, Axes] = {
    "mlp.gate_proj": (CHANNELS, HIDDEN),
    "mlp.up_proj": (CHANNELS, HIDDEN),
    "mlp.down_proj": (HIDDEN, CHANNELS),
}
PRE_NORMS: Mapping[str, Axes] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
STEM: Mapping[str, Axes] = {"model.embed_tokens": (None, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (None, HIDDEN)}

LLAMA = Family(
    model_types=(
        "ernie4_5",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    ),
    weights={**PRE_NORMS, **ATTENTION, **GATED_MLP},
    stem=STEM,
    per_layer_fields=("layer_types", "no_rope_layers"),
)
