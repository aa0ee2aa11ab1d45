"""Logits to compare: those of the tokens that are not padding, computed at once or step by step with a KV cache."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def logits_of(lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits [N, V] of the tokens that are not padding."""
    with torch.no_grad():
        return lm.eval()(**batch, use_cache=False).logits[batch["attention_mask"] == 1]


def cached_logits(lm: PreTrainedModel, batch: dict[str, Tensor], prefill: int = 7) -> Tensor:
    """The same with a KV cache: a first pass over `prefill` tokens, then one token at a time."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=lm.config)
    pieces, begin = [], 0
    with torch.no_grad():
        for end in range(prefill, ids.shape[1] + 1):
            output = lm.eval()(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
            pieces.append(output.logits)
            begin = end
    return torch.cat(pieces, dim=1)[mask == 1]


def assert_same(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance`, relative to the largest of the values."""
    assert (left - right).abs().max() <= tolerance * right.abs().max()
