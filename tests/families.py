"""Tiny causal LMs of every supported family, with all of their weights, biases and norms random.

Stock initialization leaves biases at 0 and norms at 1, which hides exactly the mistakes that surgery can make.
"""

import random
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.plan import PruningPlan

NUM_LAYERS = 6
VOCABULARY = 64

_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ATTENTION = {**_GROUPED, "head_dim": 8}
_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
_ALTERNATING = ("full_attention", "sliding_attention", "sliding_attention")

# model_type and the fields beyond the number of layers and the vocabulary.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SHAPE, **_ATTENTION, "tie_word_embeddings": False}),
    "llama_tied": (
        "llama",
        {**_SHAPE, **_ATTENTION, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {**_SHAPE, **_ATTENTION, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        {**_SHAPE, **_GROUPED, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3": ("qwen3", {**_SHAPE, **_GROUPED, "head_dim": 12, "attention_bias": True}),
    "smollm3": (
        "smollm3",
        {**_SHAPE, **_GROUPED, "no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 4},
    ),
    "granite": (
        "granite",
        {
            **_SHAPE,
            **_GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "starcoder2": (
        "starcoder2",
        {**_SHAPE, **_GROUPED, "use_bias": True, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "olmo2": ("olmo2", {**_SHAPE, **_GROUPED}),
    "gemma2": (
        "gemma2",
        {**_SHAPE, **_GROUPED, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12},
    ),
    "gemma3": (
        "gemma3_text",
        {**_SHAPE, **_GROUPED, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12},
    ),
    "phi3": ("phi3", {**_SHAPE, **_GROUPED, "original_max_position_embeddings": 64}),
    "phi3_longrope": (
        "phi3",
        {
            **_SHAPE,
            **_GROUPED,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.0, 2.5],
            },
        },
    ),
    "phi_normed": ("phi", {**_SHAPE, **_GROUPED, "qk_layernorm": True, "resid_pdrop": 0.0}),
    "opt_projected": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
    ),
    "opt_plain_norms": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "layer_norm_elementwise_affine": False,
        },
    ),
    "gpt_neox_sequential": ("gpt_neox", {**_SHAPE, "num_attention_heads": 4, "use_parallel_residual": False}),
    "mixtral": ("mixtral", {**_SHAPE, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_SHAPE,
            **_ATTENTION,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        },
    ),
    "phi": ("phi", {**_SHAPE, "num_attention_heads": 4, "resid_pdrop": 0.0}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}),
    "gpt2_inverse_scale": (
        "gpt2",
        {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox": ("gpt_neox", {**_SHAPE, "num_attention_heads": 4}),
}
_NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout", "attention_dropout")

FAMILIES = tuple(_CONFIGS)
# Declared families that `lightprune.testing.check_family` alone is run on: their layouts are those of others here.
CHECKED_ALONE = ("arcee", "ernie4_5", "hunyuan_v1_dense", "ministral", "seed_oss")
# The beginnings of the names of those whose head is the embedding.
TIED = ("llama_tied", "starcoder2", "smollm3", "gemma2", "gemma3", "opt", "gpt2")


def tiny_lm(
    name: str = "llama_tied", *, num_layers: int = NUM_LAYERS, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny LM in float32 without dropout, in training mode; `overrides` are config fields."""
    model_type, fields = _CONFIGS[name]
    fields = {"vocab_size": VOCABULARY, "num_hidden_layers": num_layers, "bos_token_id": 1, "eos_token_id": 2} | fields
    fields |= {"pad_token_id": 0}
    if name == "gpt2" or name == "gpt2_inverse_scale":
        fields["n_layer"] = fields.pop("num_hidden_layers")
    if name == "qwen2":
        fields["layer_types"] = [_ALTERNATING[i % 3] for i in range(num_layers)]
    config = CONFIG_MAPPING[model_type](**(fields | overrides))
    for field in _NO_DROPOUT:
        if hasattr(config, field) and field not in overrides:
            setattr(config, field, 0.0)
    lm = AutoModelForCausalLM.from_config(config)
    randomize(lm, seed)
    return lm.train()


@torch.no_grad()
def randomize(lm: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * noise if is_norm else 0.2 * noise)


def tokens(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids [batch, length], none of them padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and an attention mask [batch, length]; sequence b has b * 2 padding tokens on its left."""
    input_ids = tokens(batch, length, seed)
    attention_mask = torch.ones_like(input_ids)
    for row in range(batch):
        attention_mask[row, : 2 * row] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


# What a random plan takes away: layers, query heads inside groups, whole groups, MLP channels, hidden dimensions.
STRUCTURES = ("layers", "heads", "kv_groups", "channels", "hidden")
Structures = tuple[str, ...]
EVERY_COMBINATION: tuple[Structures, ...] = tuple(
    chain.from_iterable(combinations(STRUCTURES, count) for count in range(1, len(STRUCTURES) + 1))
)


def holds(config: PretrainedConfig, head_dim: int, heads: int, hidden: int) -> bool:
    """Whether the stock class of `config` can have so many heads of `head_dim` with so many hidden dimensions."""
    if config.model_type in ("gpt2", "gpt_neox"):
        return hidden == heads * head_dim
    if config.model_type == "opt":
        projected = config.word_embed_proj_dim != config.hidden_size
        return hidden == heads * head_dim and not (projected and hidden == config.word_embed_proj_dim)
    if config.model_type in ("gemma2", "gemma3_text"):
        return hidden % heads == 0
    if config.model_type == "phi" and config.qk_layernorm:
        return hidden // heads == head_dim
    if config.model_type == "phi3" and "short_factor" in config.rope_parameters:
        return hidden // heads // 2 == len(config.rope_parameters["short_factor"])
    return True


def count_choices(anatomy: Anatomy, structures: Structures, least_hidden: int = 4) -> list[tuple[int, int, int]]:
    """All (KV groups, query heads in each, hidden dimensions) that a plan which removes `structures` may keep.

    Fewer than `least_hidden` dimensions are not tried: a norm over two or three of them is nearly a step function.
    """
    config, shape = anatomy.config, anatomy.shape
    if config.model_type in ("mixtral", "qwen3_moe") and {"channels", "hidden"} & set(structures):
        return []
    if ("layers" in structures and shape.layers == 1) or ("channels" in structures and shape.channels == 1):
        return []
    per_group = shape.heads // shape.kv_groups
    return [
        (groups, queries, hidden)
        for groups in (range(1, shape.kv_groups) if "kv_groups" in structures else [shape.kv_groups])
        for queries in (range(1, per_group) if "heads" in structures else [per_group])
        for hidden in (range(least_hidden, shape.hidden) if "hidden" in structures else [shape.hidden])
        if holds(config, shape.head_dim, groups * queries, hidden)
    ]


def combinations_of(lm: PreTrainedModel) -> list[Structures]:
    """Every combination of structures that a model can lose together."""
    anatomy = anatomy_of(lm)
    return [structures for structures in EVERY_COMBINATION if count_choices(anatomy, structures)]


def random_plan(anatomy: Anatomy, structures: Structures, rng: random.Random) -> PruningPlan:
    """A plan that removes something of each of `structures`: random counts, and random units in every layer."""
    shape, per_group = anatomy.shape, anatomy.shape.heads // anatomy.shape.kv_groups
    groups, queries, hidden = rng.choice(count_choices(anatomy, structures))

    def some(total: int, count: int) -> list[int]:
        return sorted(rng.sample(range(total), count))

    def heads() -> list[int]:
        kept = some(shape.kv_groups, groups)
        return [group * per_group + head for group in kept for head in some(per_group, queries)]

    channels = rng.randint(1, shape.channels - 1)
    layers = range(shape.layers)
    return PruningPlan.keeping(
        anatomy,
        layers=some(shape.layers, rng.randint(1, shape.layers - 1)) if "layers" in structures else None,
        heads=[heads() for _ in layers] if {"heads", "kv_groups"} & set(structures) else None,
        channels=[some(shape.channels, channels) for _ in layers] if "channels" in structures else None,
        hidden=some(shape.hidden, hidden) if "hidden" in structures else None,
    )
