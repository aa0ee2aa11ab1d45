"""Tiny causal LMs of every supported family, with all of their weights, biases and norms random.

Stock initialization leaves biases at 0 and norms at 1, which hides exactly the mistakes that surgery can make.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

NUM_LAYERS = 6
VOCABULARY = 64

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
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
        {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3": ("qwen3", {**_SHAPE, **_ATTENTION, "attention_bias": True}),
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
_NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout")

FAMILIES = tuple(_CONFIGS)


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
