"""A zero-shot accuracy: whether a model finds the true continuation of a text likelier than another piece of it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CONTEXT, CONTINUATION, PAIRS = 32, 8, 4


def pairs_of(blocks: Tensor, seed: int = 0) -> Tensor:
    """Texts [n, 2, CONTEXT + CONTINUATION] made from blocks [b, T] of token ids, PAIRS of each block.

    The first of two is what stands there; the second ends with as many tokens from another place of the same block.
    """
    generator = torch.Generator().manual_seed(seed)
    length, pairs = CONTEXT + CONTINUATION, []
    for block in blocks:
        for _ in range(PAIRS):
            start, other = torch.randint(len(block) - length, (2,), generator=generator).tolist()
            true = block[start : start + length]
            wrong = block[other + CONTEXT : other + length]
            if not torch.equal(true[CONTEXT:], wrong):
                pairs.append(torch.stack([true, torch.cat([true[:CONTEXT], wrong])]))
    return torch.stack(pairs)


@torch.no_grad()
def accuracy(lm: Any, batches: Iterable[Tensor], size: int = 32) -> float:
    """The share of pairs whose true continuation has the smaller loss.

    Args:
        lm: the causal LM, in eval mode.
        batches: held-out blocks of token ids [b, T].
        size: pairs in a pass.
    """
    pairs = torch.cat([pairs_of(blocks, number) for number, blocks in enumerate(batches)])
    right = 0
    for some in pairs.split(size):
        ids = some.flatten(0, 1).to(lm.device)
        logits = lm(ids, use_cache=False, logits_to_keep=CONTINUATION + 1).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), ids[:, -CONTINUATION:], reduction="none").sum(-1)
        right += int((losses[::2] < losses[1::2]).sum())
    return right / len(pairs)
