"""OPT: learned positions, an MLP directly on the layer; OPT-350m embeds in fewer dimensions and projects."""

from dataclasses import replace

from transformers import PretrainedConfig

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS, Resize
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.shape_rules import heads_fill_hidden, projections_stay

_NORM_AND_POSITIONS = {"model.decoder.final_layer_norm": (HIDDEN,), "model.decoder.embed_positions": (None, HIDDEN)}


def _variant(config: PretrainedConfig) -> Family:
    return OPT if config.word_embed_proj_dim == config.hidden_size else _PROJECTED


def _embedding_width(config: PretrainedConfig, resize: Resize) -> None:
    """Embed in the hidden dimensions that stay, where the embedding is not projected onto them."""
    if config.word_embed_proj_dim == resize.source.hidden:
        config.word_embed_proj_dim = resize.target.hidden


OPT = Family(
    model_types=("opt",),
    weights={
        "self_attn_layer_norm": (HIDDEN,),
        "self_attn.q_proj": (HEADS, HIDDEN),
        "self_attn.k_proj": (KV_GROUPS, HIDDEN),
        "self_attn.v_proj": (KV_GROUPS, HIDDEN),
        "self_attn.out_proj": (HIDDEN, HEADS),
        "final_layer_norm": (HIDDEN,),
        "fc1": (CHANNELS, HIDDEN),
        "fc2": (HIDDEN, CHANNELS),
    },
    writers={"self_attn.out_proj": LINEAR, "fc2": LINEAR},
    stem={"model.decoder.embed_tokens": (None, HIDDEN), **_NORM_AND_POSITIONS, "lm_head": (None, HIDDEN)},
    layers="model.decoder.layers",
    channels_field="ffn_dim",
    head_dim_field=None,
    predicates=(heads_fill_hidden,),
    variant=_variant,
    configure=_embedding_width,
)
_PROJECTED = replace(
    OPT,
    stem={
        "model.decoder.project_in": (HIDDEN, None),
        **_NORM_AND_POSITIONS,
        "model.decoder.project_out": (None, HIDDEN),
    },
    predicates=(heads_fill_hidden, projections_stay),
)
