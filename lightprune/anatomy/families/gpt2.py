"""GPT-2: Conv1D projections (weights [in, out]), and an attention scale that may depend on the layer's index."""

from typing import Any

import torch
from torch import nn

from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS
from lightprune.anatomy.base import LINEAR, Family
from lightprune.anatomy.shape_rules import heads_fill_hidden


@torch.no_grad()
def _keep_attention_scale(layer: nn.Module, old: int, new: int) -> None:
    """Fold `1 / (index + 1)` into the query weights, so that a moved layer attends as it did before.

    With `scale_attn_by_inverse_layer_idx` a stock GPT-2 divides its scores by `index + 1`, whatever the index is
    after the cut; the queries take the factor `(new + 1) / (old + 1)` to undo the change.
    """
    attention: Any = layer.attn
    if not attention.scale_attn_by_inverse_layer_idx:
        return
    factor = (new + 1) / (old + 1)
    queries = slice(0, attention.split_size)
    attention.c_attn.weight[:, queries] *= factor
    attention.c_attn.bias[queries] *= factor
    attention.scaling /= factor


GPT2 = Family(
    model_types=("gpt2",),
    weights={
        "ln_1": (HIDDEN,),
        "attn.c_attn": (HEADS + KV_GROUPS + KV_GROUPS, HIDDEN),
        "attn.c_proj": (HIDDEN, HEADS),
        "ln_2": (HIDDEN,),
        "mlp.c_fc": (CHANNELS, HIDDEN),
        "mlp.c_proj": (HIDDEN, CHANNELS),
    },
    writers={"attn.c_proj": LINEAR, "mlp.c_proj": LINEAR},
    stem={
        "transformer.wte": (None, HIDDEN),
        "transformer.wpe": (None, HIDDEN),
        "transformer.ln_f": (HIDDEN,),
        "lm_head": (None, HIDDEN),
    },
    layers="transformer.h",
    channels_field="n_inner",
    head_dim_field=None,
    predicates=(heads_fill_hidden,),
    layer_index=("attn.layer_idx",),
    renumber=_keep_attention_scale,
)
