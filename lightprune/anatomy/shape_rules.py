"""What a shape must satisfy for a stock `transformers` class to express it: each a sentence if it does not."""

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig

from lightprune.anatomy.axes import Shape


def even_groups(heads: int, kv_groups: int) -> str | None:
    """Every key-value head serves the same number of query heads. Nothing in transformers checks this."""
    if heads % kv_groups == 0:
        return None
    below = heads // kv_groups * kv_groups
    either = f"{below} or {below + kv_groups}" if below else str(kv_groups)
    return f"{heads} query heads do not divide evenly among {kv_groups} key-value heads (nearest: {either} query heads)"


def heads_divide_hidden(shape: Shape, config: PretrainedConfig) -> str | None:
    """The config refuses a hidden size that is no multiple of the number of heads (Gemma)."""
    if shape.hidden % shape.heads == 0:
        return None
    return (
        f"{type(config).__name__} refuses {shape.hidden} hidden dimensions with {shape.heads} heads, "
        "which do not divide them"
    )


def heads_fill_hidden(shape: Shape, config: PretrainedConfig) -> str | None:
    """The class has no head_dim: heads and hidden dimensions can only be cut together (OPT, GPT-2, GPT-NeoX)."""
    if shape.heads * shape.head_dim == shape.hidden:
        return None
    return (
        f"{type(config).__name__} has no head_dim of its own, so {shape.heads} heads of {shape.head_dim} dimensions "
        f"need exactly {shape.heads * shape.head_dim} hidden dimensions, not {shape.hidden}"
    )


def query_norm_fits(shape: Shape, config: PretrainedConfig) -> str | None:
    """Phi sizes its optional q and k norms by hidden // heads, whatever head_dim is."""
    if not config.qk_layernorm or shape.hidden // shape.heads == shape.head_dim:
        return None
    return (
        f"with qk_layernorm, {type(config).__name__} needs hidden // heads to be {shape.head_dim}, "
        f"and {shape.hidden} // {shape.heads} is {shape.hidden // shape.heads}"
    )


def long_rope_fits(shape: Shape, config: PretrainedConfig) -> str | None:
    """Phi3 checks its longrope factors against hidden // heads, whatever head_dim is."""
    rope = config.rope_parameters
    factors = (rope or {}).get("short_factor")
    if factors is None:
        return None
    dimensions = int(shape.hidden // shape.heads * rope.get("partial_rotary_factor", 1.0))
    if dimensions // 2 == len(factors):
        return None
    return (
        f"{type(config).__name__} holds {len(factors)} longrope factors and would need {dimensions // 2} "
        f"for {shape.hidden} hidden dimensions with {shape.heads} heads"
    )


def projections_stay(shape: Shape, config: PretrainedConfig) -> str | None:
    """OPT drops its embedding projections where hidden_size equals word_embed_proj_dim."""
    if shape.hidden != config.word_embed_proj_dim:
        return None
    return (
        "OPT drops its embedding projections where the hidden dimensions equal word_embed_proj_dim="
        f"{config.word_embed_proj_dim}, so {shape.hidden} cannot be expressed"
    )


def nearest(shape: Shape, source: Shape, fits: Callable[[Shape], bool]) -> list[Shape]:
    """The shapes nearest to `shape`: other hidden dimensions with its heads, and other heads with its dimensions.

    Where neither can be, both change. Groups keep as many query heads as in `shape`.

    Args:
        shape: counts that the model's class cannot express.
        source: the uncut model's counts.
        fits: whether the model's class can express a shape.
    """
    heads = [(groups * shape.heads_per_group, groups) for groups in range(1, source.kv_groups + 1)]
    hidden = range(1, source.hidden + 1)
    by_hidden = [replace(shape, hidden=d) for d in hidden]
    by_heads = [replace(shape, heads=h, kv_groups=groups) for h, groups in heads]
    found = [min(filter(fits, row), key=shape.distance, default=None) for row in (by_hidden, by_heads)]
    if not any(found):
        both = (replace(shape, heads=h, kv_groups=groups, hidden=d) for h, groups in heads for d in hidden)
        found = [min(filter(fits, both), key=shape.distance, default=None)]
    return [option for option in found if option is not None]
