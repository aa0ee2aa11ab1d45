"""The dtypes of a model's weights, which may be several."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def main_dtype(lm: PreTrainedModel) -> torch.dtype:
    """The dtype of most of a model's floating-point weights."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in lm.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else lm.dtype


@contextmanager
def in_dtype(lm: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside, all floating-point weights have one dtype: without autocast, a stock class cannot run in several.

    The parameters stay the same objects, so that ties hold and an optimizer does not notice.
    """
    weights = [(p, p.data) for p in lm.parameters() if p.is_floating_point() and p.dtype != dtype]
    try:
        for parameter, data in weights:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
