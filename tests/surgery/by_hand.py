"""What a cut leaves of parameters and config, worked out with plain loops; nothing of the anatomy is read.

Each entry of `LAYOUT` says what the dimensions of a parameter count: "heads" are the
rows of all query heads, "q k v" one block for each, "q,k,v" the three of a head side by side.
"""

import re
from typing import Any

import numpy as np

from lightprune.plan import PruningPlan

Array = np.ndarray[Any, Any]

# (end of the parameter's name, what its dimensions count); the first that fits holds. "-" is left whole.
LAYOUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"self_attn\.q_proj\.(weight|bias)", ("heads", "hidden")),
    (r"self_attn\.[kv]_proj\.(weight|bias)", ("groups", "hidden")),
    (r"self_attn\.(o_proj|out_proj|dense)\.(weight|bias)", ("hidden", "heads")),
    (r"self_attn\.qkv_proj\.weight", ("q k v", "hidden")),
    (r"attention\.query_key_value\.(weight|bias)", ("q,k,v", "hidden")),
    (r"attention\.dense\.(weight|bias)", ("hidden", "heads")),
    (r"attn\.c_attn\.weight", ("hidden", "q k v")),
    (r"attn\.c_attn\.bias", ("q k v",)),
    (r"attn\.c_proj\.weight", ("heads", "hidden")),
    (r"attn\.c_proj\.bias", ("hidden",)),
    (r"mlp\.(gate_proj|up_proj|fc1|dense_h_to_4h)\.(weight|bias)", ("channels", "hidden")),
    (r"mlp\.(down_proj|fc2|dense_4h_to_h)\.(weight|bias)", ("hidden", "channels")),
    (r"mlp\.gate_up_proj\.weight", ("gate up", "hidden")),
    (r"model\.layers\.\d+\.mlp\.c_fc\.weight", ("channels", "hidden")),  # Starcoder 2; GPT-2's lie across
    (r"model\.layers\.\d+\.mlp\.c_proj\.weight", ("hidden", "channels")),
    (r"mlp\.c_fc\.weight", ("hidden", "channels")),
    (r"mlp\.c_fc\.bias", ("channels",)),
    (r"mlp\.c_proj\.weight", ("channels", "hidden")),
    (r"mlp\.c_proj\.bias", ("hidden",)),
    (r"layers\.\d+\.fc1\.(weight|bias)", ("channels", "hidden")),
    (r"layers\.\d+\.fc2\.(weight|bias)", ("hidden", "channels")),
    (r"(layer_?norm|layer_norm|ln_[12f]|model\.norm)\.(weight|bias)", ("hidden",)),
    (r"(embed_tokens|lm_head)\.weight", ("-", "embedding")),
    (r"(embed_positions|wte|wpe|embed_in)\.weight", ("-", "hidden")),
    (r"project_in\.weight", ("hidden", "-")),
    (r"project_out\.weight", ("-", "hidden")),
    (r"lm_head\.bias", ("-",)),
)
# OLMo 2 alone normalizes the queries of all heads together; Qwen 3 and Gemma 3 do so head by head, Phi too.
OF_ALL_HEADS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"self_attn\.q_norm\.weight", ("heads",)),
    (r"self_attn\.k_norm\.weight", ("groups",)),
)
OF_ONE_HEAD: tuple[tuple[str, tuple[str, ...]], ...] = ((r"self_attn\.[qk]_(norm|layernorm)\.(weight|bias)", ("-",)),)
# Of a mixture of experts, only the attention's projections are cut.
MIXTURES = ("mixtral", "qwen3_moe")


def indices(counted: str, length: int, plan: PruningPlan, layer: int) -> list[int]:
    """The rows that stay, in order."""
    source = plan.source
    hidden = range(source.hidden) if plan.kept_hidden is None else plan.kept_hidden
    heads = range(source.heads) if plan.kept_heads is None else plan.kept_heads[layer]
    channels = range(source.channels) if plan.kept_channels is None else plan.kept_channels[layer]
    groups: list[int] = []
    for head in heads:
        group = head // (source.heads // source.kv_groups)
        if group not in groups:
            groups.append(group)
    kept: list[int] = []
    if counted == "-" or (counted == "embedding" and length != source.hidden):  # OPT-350m embeds in fewer dimensions
        kept = list(range(length))
    elif counted in ("hidden", "embedding"):
        kept = list(hidden)
    elif counted == "channels":
        kept = list(channels)
    elif counted == "gate up":
        kept = [*channels, *(source.channels + channel for channel in channels)]
    elif counted in ("heads", "groups"):
        for index in heads if counted == "heads" else groups:
            for d in range(source.head_dim):
                kept.append(index * source.head_dim + d)
    elif counted == "q,k,v":
        for head in heads:
            for part in range(3):
                for d in range(source.head_dim):
                    kept.append((head * 3 + part) * source.head_dim + d)
    elif counted == "q k v":
        for head in heads:
            for d in range(source.head_dim):
                kept.append(head * source.head_dim + d)
        for part in range(2):
            for group in groups:
                for d in range(source.head_dim):
                    kept.append((source.heads + part * source.kv_groups + group) * source.head_dim + d)
    return kept


def layer_of(name: str) -> int | None:
    """The index of the layer that a parameter belongs to; None outside the layers."""
    match = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


def new_name(name: str, plan: PruningPlan) -> str | None:
    """What the parameter is called after the cut; None if it goes with its layer."""
    layer = layer_of(name)
    if layer is None:
        return name
    if layer not in plan.kept_layers:
        return None
    return re.sub(r"\.(layers|h)\.\d+\.", rf".\1.{plan.kept_layers.index(layer)}.", name)


def sliced(name: str, array: Array, plan: PruningPlan) -> Array:
    """What stays of the parameter `name`, or of anything of its shape."""
    if plan.model_type in MIXTURES and not re.search(r"self_attn\.[qkvo]_proj", name):
        return array
    layout = (OF_ALL_HEADS if plan.model_type == "olmo2" else OF_ONE_HEAD) + LAYOUT
    counts = next(counts for ending, counts in layout if re.search(ending + "$", name))
    for dimension, counted in zip(range(array.ndim), counts, strict=False):
        rows = []
        for index in indices(counted, array.shape[dimension], plan, layer_of(name) or 0):
            rows.append(np.take(array, index, axis=dimension))
        array = np.stack(rows, axis=dimension)
    return array


def config_fields(before: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """The dictionary of the cut model's config, made from that of the uncut one."""
    family, source, layers = before["model_type"], plan.source, plan.kept_layers
    after = before | {"n_layer" if family == "gpt2" else "num_hidden_layers": len(layers)}
    for field in ("layer_types", "no_rope_layers"):
        if before.get(field) is not None:
            after[field] = [before[field][layer] for layer in layers]
    if family == "qwen3_moe":
        dense = []
        for new, old in enumerate(layers):
            if old in before["mlp_only_layers"] or (old + 1) % before["decoder_sparse_step"] > 0:
                dense.append(new)
        after |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if plan.kept_heads is None and plan.kept_channels is None and plan.kept_hidden is None:
        return after
    heads = range(source.heads) if plan.kept_heads is None else plan.kept_heads[0]
    groups = {head // (source.heads // source.kv_groups) for head in heads}
    hidden = source.hidden if plan.kept_hidden is None else len(plan.kept_hidden)
    channels = source.channels if plan.kept_channels is None else len(plan.kept_channels[0])
    if before.get("word_embed_proj_dim") == source.hidden:
        after["word_embed_proj_dim"] = hidden
    if "num_key_value_heads" in before:
        after["num_key_value_heads"] = len(groups)
    if family not in ("opt", "gpt2", "gpt_neox"):
        after["head_dim"] = source.head_dim
    after["n_embd" if family == "gpt2" else "hidden_size"] = hidden
    after["n_head" if family == "gpt2" else "num_attention_heads"] = len(heads)
    after[{"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")] = channels
    return after
