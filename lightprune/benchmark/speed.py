"""Seconds that one model takes: for a prompt, and for each token after it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        prompts: tokens of a prompt, each a row of the table.
        batches: sequences beside each other, likewise.
        tokens: generated after each prompt.
        repeats: rounds that count; in each of them every model has its turn.
        warmup: rounds before them.
    """

    prompts: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    tokens: int = 32
    repeats: int = 5
    warmup: int = 1

    def settings(self) -> Iterator[tuple[int, int]]:
        """Every batch with every prompt."""
        for batch in self.batches:
            for prompt in self.prompts:
                yield batch, prompt


@dataclass(frozen=True)
class Taken:
    """What a turn took.

    Attributes:
        first: seconds from the prompt [B, T] to the logits of the next token.
        token: seconds of each token after the first.
        peak: bytes that a CUDA device held at most, but for what is not this model's; 0 elsewhere.
    """

    first: float
    token: float
    peak: int


@torch.inference_mode()
def taken(lm: PreTrainedModel, prompt: Tensor, tokens: int) -> Taken:
    """Read a prompt [B, T] and generate greedily, with a cache that grows; the clock waits for the device."""
    cache, others = DynamicCache(config=lm.config), 0
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
        others = torch.cuda.memory_allocated(lm.device) - sum(weight.nbytes for weight in lm.parameters())
    begin = _now(lm.device)
    chosen = _step(lm, prompt, cache)
    first = _now(lm.device)
    for _ in range(tokens):
        chosen = _step(lm, chosen, cache)
    end = _now(lm.device)
    peak = torch.cuda.max_memory_allocated(lm.device) - others if lm.device.type == "cuda" else 0
    return Taken(first - begin, (end - first) / tokens, peak)


def _step(lm: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest token [B, 1] after some."""
    output: Any = lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen: Tensor = output.logits[:, -1:].argmax(-1)
    return chosen


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
