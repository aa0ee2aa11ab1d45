"""How far a student's distributions over the next token are from a teacher's, in chunks of tokens.

Shapes: N tokens, V tokens in the vocabulary, k <= V that the teacher finds likeliest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**25
"""How many logits of a chunk are held in float32 at once, of the student and of the teacher each: 128 MiB."""


class Likeliest(NamedTuple):
    """What a teacher says of the k tokens that it finds likeliest; all others are one event, "another token".

    Attributes:
        tokens: their indices [N, k].
        log_probs: their log-probabilities [N, k].
    """

    tokens: Tensor
    log_probs: Tensor


def likeliest(logits: Tensor, temperature: float, k: int) -> Likeliest:
    """What a teacher's logits [N, V] say of the k likeliest tokens, softened by the temperature."""
    return Likeliest(*(logits.float() / temperature).log_softmax(-1).topk(k, dim=-1)[::-1])


# For a slice of the N tokens: the teacher's logits [n, V], or what it says of the likeliest ones.
Teaching = Callable[[slice], "Tensor | Likeliest"]


def divergence(
    logits: Tensor,
    teaching: Teaching,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """The sum over tokens of w * T^2 * KL(teacher || student), both softened by the temperature T.

    KL = sum_v p_v (log p_v - log q_v) with p = softmax(teacher / T) and q = softmax(student / T) (Hinton et al., arXiv
    1503.02531, section 2; T^2 keeps the gradient's size). Over the top k, p and q have k + 1 events: these k tokens,
    and any other. No logits of all tokens are held in float32 at once; the gradient, in the dtype of the logits, is.

    Args:
        logits: the student's [N, V]; gradients reach them alone.
        teaching: gives the teacher's side for a slice of the tokens.
        weights: w [N], float32; 0 for tokens that do not count.
        temperature: T. Where the teaching is of the likeliest tokens, it has been softened already.
        top_k: k; None is the whole vocabulary.

    Returns:
        The sum, float32 [].
    """
    return cast(
        Tensor,
        _Divergence.apply(logits, teaching, weights, temperature, top_k),  # type: ignore[no-untyped-call]
    )


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value, so that the teacher's logits are made once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teaching: Teaching, weights: Tensor, temperature: float, top_k: int | None
    ) -> Tensor:
        total = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size = max(CHUNK_NUMBERS // logits.shape[-1], 1)
        for begin in range(0, len(logits), size):
            chunk = slice(begin, min(begin + size, len(logits)))
            log_q = (logits[chunk].float() / temperature).log_softmax(-1)
            taught = teaching(chunk)
            if isinstance(taught, Tensor) and top_k is not None:
                taught = likeliest(taught, temperature, top_k)
            if isinstance(taught, Tensor):
                kl, slope = _whole(log_q, (taught.float() / temperature).log_softmax(-1))
            else:
                kl, slope = _of_likeliest(log_q, taught)
            total += temperature**2 * (weights[chunk] * kl).sum()
            if gradient is not None:
                gradient[chunk] = (slope * (temperature * weights[chunk]).unsqueeze(-1)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), None, None, None, None


def _whole(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL [n] over the whole vocabulary, and its gradient with respect to the student's softened logits [n, V]."""
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
    return kl, log_q.exp() - p


def _of_likeliest(log_q: Tensor, taught: Likeliest) -> tuple[Tensor, Tensor]:
    """The same over k + 1 events.

    With p_o and q_o the probabilities of any other token, KL = sum_k p (log p - log q) + p_o (log p_o - log q_o). The
    gradient is q - p for the k tokens, and q - p_o q / q_o for the others.
    """
    log_p = taught.log_probs.float()
    p, q, log_q_k = log_p.exp(), log_q.exp(), log_q.gather(-1, taught.tokens.long())
    other_p = (1 - p.sum(-1)).clamp(min=0)
    tiny = torch.finfo(q.dtype).tiny
    others = q.scatter(-1, taught.tokens.long(), 0)
    other_q = others.sum(-1).clamp(min=tiny)
    kl = (p * (log_p - log_q_k)).sum(-1) + torch.special.xlogy(other_p, other_p / other_q)
    slope = others * (1 - other_p / other_q).unsqueeze(-1)
    return kl, slope.scatter(-1, taught.tokens.long(), log_q_k.exp() - p)
