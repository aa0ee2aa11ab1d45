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
    """Seconds.

    Attributes:
        first: from the prompt [B, T] to the logits of the next token.
        token: of each token after the first.
    """

    first: float
    token: float


@torch.inference_mode()
def taken(lm: PreTrainedModel, prompt: Tensor, tokens: int) -> Taken:
    """Read a prompt [B, T] and generate greedily, with a cache that grows; the clock waits for the device."""
    cache = DynamicCache(config=lm.config)
    begin = _now(lm.device)
    chosen = _step(lm, prompt, cache)
    first = _now(lm.device)
    for _ in range(tokens):
        chosen = _step(lm, chosen, cache)
    return Taken(first - begin, (_now(lm.device) - first) / tokens)


def _step(lm: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest token [B, 1] after some."""
    output: Any = lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen: Tensor = output.logits[:, -1:].argmax(-1)
    return chosen


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
