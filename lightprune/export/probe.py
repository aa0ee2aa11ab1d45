"""A short probe: fixed tokens, and the logits that two causal LMs give for them.

Shapes: N tokens that are not padding, T tokens in a sequence, V tokens in the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.integrations.dtypes import main_dtype
from lightprune.integrations.models import attention_of, set_attention

# The largest difference of a logit, relative to the largest logit, between two models that take the same steps.
SAME_STEPS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# The same where the steps differ: a folded factor, or one token instead of many.
OTHER_STEPS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}

# Tokens of the sequences that are compared, and how many of them are fed to the cache one by one.
LENGTH, SINGLE_STEPS = 16, 4

# Switches in a config that change what `forward` returns, and the values with which every class returns logits alone.
# A mixture of experts with its router logits on computes a loss that fails beside a cache, in `generate` too.
PLAIN_OUTPUTS = {
    "output_router_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}


# What runs on every device and in every dtype; others, such as FlashAttention, need a GPU and half precision.
_ANYWHERE = ("eager", "sdpa")


@contextmanager
def plain_outputs(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, a forward pass returns logits and a cache, whatever else the model's config asks for."""
    config = lm.config
    changed = {n: getattr(config, n) for n, v in PLAIN_OUTPUTS.items() if getattr(config, n, v) not in (v, None)}
    try:
        for name in changed:
            setattr(config, name, PLAIN_OUTPUTS[name])
        yield
    finally:
        for name, value in changed.items():
            setattr(config, name, value)


@contextmanager
def attention_that_runs(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends by an implementation that runs on its device and in the dtype of most weights."""
    config, given = lm.config, attention_of(lm.config)
    on_gpu = lm.device.type != "cpu" and main_dtype(lm) in (torch.float16, torch.bfloat16)
    if given in _ANYWHERE or on_gpu:
        yield
        return
    set_attention(config, "eager")
    try:
        yield
    finally:
        set_attention(config, given)


def probe(lm: PreTrainedModel, *, padding: int) -> dict[str, Tensor]:
    """Fixed tokens and an attention mask [2, T], T at most LENGTH; the second sequence has `padding` on its left."""
    config = lm.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    tokens = torch.arange(2 * length, device=lm.device).view(2, length) * 7919 % config.vocab_size
    mask = torch.ones_like(tokens)
    mask[1, : min(padding, length // 4)] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def probe_logits(lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits [N, V] in float32 of the N tokens that are not padding."""
    output: Any = lm(**batch, use_cache=False)
    return cast(Tensor, output.logits.float()[batch["attention_mask"] == 1])


@torch.no_grad()
def cached_logits(lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The same with a KV cache: all but a few tokens at once, then one at a time."""
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    length = tokens.shape[1]
    pieces, cache, begin = [], None, 0
    for end in range(max(length - SINGLE_STEPS, 1), length + 1):
        output: Any = lm(
            input_ids=tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        pieces.append(output.logits.float())
        cache, begin = output.past_key_values, end
    return torch.cat(pieces, dim=1)[mask == 1]


def logits_apart(theirs: PreTrainedModel, ours: PreTrainedModel, *, exact: bool = True) -> list[str]:
    """By how much the logits of two models differ, in words; empty where they do not.

    What a model shows with a KV cache is rounded otherwise than without, by 4e-6 (SmolLM2-135M) to 4e-4 (the same, cut
    in width) in float32: where it is more than usual, it counts as long as both models show it. Other kernels for the
    same model may differ by as much.

    Args:
        theirs: in eval mode, on the device of `ours`.
        ours: in eval mode; its logits are the ones expected.
        exact: whether both are meant to compute the same in the same steps.
    """
    least, most = (tolerance(table, ours.dtype) for table in (SAME_STEPS, OTHER_STEPS))
    with plain_outputs(theirs), plain_outputs(ours):
        whole, padded = probe(ours, padding=0), probe(ours, padding=LENGTH // 4)
        beside_padding, cached = probe_logits(theirs, padded), cached_logits(theirs, padded)
        rounding = _apart(cached, beside_padding)
        allowed = min(max(least, rounding), most) if exact else most
        errors = {
            "logits": _apart(probe_logits(theirs, whole), probe_logits(ours, whole)),
            "logits beside padding": _apart(beside_padding, probe_logits(ours, padded)),
        }
        if not rounding <= most:
            errors["cached logits"] = _apart(cached, cached_logits(ours, padded))
    return [
        f"{name} by {error:.1e} of the largest, where {allowed:.0e} is allowed"
        for name, error in errors.items()
        if not error <= allowed  # NaN is not
    ]


def tolerance(table: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    """What `table` allows in a dtype, or in that to which the hardware rounds the factors of its products."""
    return table[torch.bfloat16 if dtype == torch.float32 and _rounds_float32() else dtype]


def _rounds_float32() -> bool:
    """Whether products in float32 may be those of TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through `torch.backends`, and then never to the highest
        return True


def _apart(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected logit; NaN where not all are finite."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def not_finite(lm: PreTrainedModel) -> str | None:
    """Which of a model's weights hold infinities or NaN, in words; None if none does."""
    counts = {name: int((~weight.isfinite()).sum()) for name, weight in lm.named_parameters()}
    names = [name for name, count in counts.items() if count]
    if not names:
        return None
    first = names[0]
    return (
        f"{len(names)} of {len(counts)} weights hold values that are not finite (such as {first}: "
        f"{counts[first]:,} of {lm.get_parameter(first).numel():,})"
    )
