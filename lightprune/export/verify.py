"""The written directory against the model in memory: weights exactly, logits up to rounding, with and without cache."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightprune.export.convert import Outgoing
from lightprune.expressible import is_tied
from lightprune.hub import loading_problems

# The largest difference of a logit, relative to the largest logit, between two models that take the same steps.
SAME_STEPS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# The same where the steps differ: one token instead of many, or a folded factor. A sound cache is off by 4e-6, 3e-3 and
# 5e-2 in float32, float16 and bfloat16 (SmolLM2-135M); a broken one by as much as the logits themselves.
OTHER_STEPS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}

# Tokens of the sequences that are compared, and how many of them are fed to the cache one by one.
LENGTH, SINGLE_STEPS = 16, 4


def verify_export(path: Path, lm: PreTrainedModel, out: Outgoing) -> None:
    """Reload a directory as anyone would and compare it with the model in memory, which is in eval mode.

    Args:
        path: the directory.
        lm: the model in memory, its weights in the dtype that was written.
        out: what was written for it.

    Raises:
        RuntimeError: weights, ties or logits differ, on padded sequences or not, cached or not.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        attn_implementation=lm.config._attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    reloaded, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    reloaded.to(lm.device)  # type: ignore[arg-type]
    differences = loading_problems(report) or _differences(reloaded, lm, out)
    if differences:
        raise RuntimeError(f"The export was discarded, since the reloaded model differs: {', '.join(differences)}.")


def _differences(reloaded: PreTrainedModel, lm: PreTrainedModel, out: Outgoing) -> list[str]:
    written, read = out.model.state_dict(), reloaded.state_dict()
    differing = [n for n in written.keys() | read.keys() if not _equal(written.get(n), read.get(n))]
    if differing:
        return [f"{len(differing)} weights (such as {min(differing)})"]
    if is_tied(reloaded) != is_tied(lm):
        return [f"its embeddings are {'' if is_tied(reloaded) else 'not '}tied"]
    _round_buffers(reloaded, lm)
    whole, padded = probe(lm, padding=0), probe(lm, padding=LENGTH // 4)
    table = SAME_STEPS if out.exact else OTHER_STEPS
    logits = probe_logits(reloaded, padded)
    return [
        *_excess("logits", probe_logits(reloaded, whole), probe_logits(lm, whole), tolerance(table, lm.dtype)),
        *_excess("logits beside padding", logits, probe_logits(lm, padded), tolerance(table, lm.dtype)),
        *_excess("cached logits", cached_logits(reloaded, padded), logits, tolerance(OTHER_STEPS, lm.dtype)),
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


def _excess(what: str, logits: Tensor, expected: Tensor, allowed: float) -> list[str]:
    """The largest difference, relative to the largest expected logit, in words; none if it is allowed."""
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if error <= allowed:  # NaN is not
        return []
    return [f"{what} by {error:.1e} of the largest, where {allowed:.0e} is allowed"]


def _round_buffers(reloaded: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Bring the rotary frequencies and the like to the dtype that training gave them.

    `bf16-true` rounds them, a reloaded model computes them anew in float32, and the logits show it. Not the scale of an
    embedding: where that differs, the weights make up for it.
    """
    ours = dict(lm.named_buffers())
    for name, buffer in reloaded.named_buffers():
        if name in ours and not name.endswith("embed_scale"):
            buffer.data = buffer.to(ours[name].dtype)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def probe(lm: PreTrainedModel, *, padding: int) -> dict[str, Tensor]:
    """Fixed tokens and an attention mask [2, T], T at most LENGTH; the second sequence has `padding` on its left."""
    length = min(LENGTH, getattr(lm.config, "max_position_embeddings", LENGTH))
    tokens = torch.arange(2 * length, device=lm.device).view(2, length) * 7919 % lm.config.vocab_size
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
