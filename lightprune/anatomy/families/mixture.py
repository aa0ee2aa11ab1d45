"""Mixtures of experts: Mixtral and Qwen3-MoE, for layers and attention. Experts and hidden dimensions stay."""

from transformers import PretrainedConfig

from lightprune.anatomy.axes import HEADS, KV_GROUPS, Resize
from lightprune.anatomy.base import LINEAR, Family

_ATTENTION = {
    "self_attn.q_proj": (HEADS, None),
    "self_attn.k_proj": (KV_GROUPS, None),
    "self_attn.v_proj": (KV_GROUPS, None),
    "self_attn.o_proj": (None, HEADS),
}
# Sparse layers have experts, dense ones an ordinary MLP.
_WRITERS = {"self_attn.o_proj": LINEAR, "mlp.experts": ("down_proj",), "mlp.down_proj": LINEAR}


def _name_dense_layers(config: PretrainedConfig, resize: Resize) -> None:
    """State for each layer whether it has an ordinary MLP: a step count would mean other layers once some are gone."""
    step = config.decoder_sparse_step
    dense = [i for i in range(resize.source.layers) if i in config.mlp_only_layers or (i + 1) % step != 0]
    config.mlp_only_layers = [new for new, old in enumerate(resize.kept_layers) if old in dense]
    config.decoder_sparse_step = 1


MIXTRAL = Family(model_types=("mixtral",), weights=_ATTENTION, writers=_WRITERS, stem={})
QWEN3_MOE = Family(
    model_types=("qwen3_moe",), weights=_ATTENTION, writers=_WRITERS, stem={}, configure=_name_dense_layers
)
