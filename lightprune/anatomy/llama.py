"""Llama and the families that share its layout: `model.layers`, attention in `self_attn`."""

from lightprune.anatomy.base import Family

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="model.layers",
    per_layer_fields=("layer_types",),
)
