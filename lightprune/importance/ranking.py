"""Scores of units: from activations to numbers that rank, and from these to what stays. Pure functions.

Shapes: N tokens, S places in the model, n units of `rows` columns each (a head of D dimensions has D, a channel one),
m = n * rows columns.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightprune.anatomy import Shape

Metric = Literal["mean", "l2", "fluctuation"]


def magnitudes(values: Tensor, rows: int) -> Tensor:
    """The l2 norm of every unit's columns: [..., m] to [..., n]."""
    norms: Tensor = torch.linalg.vector_norm(torch.unflatten(values, -1, (-1, rows)), dim=-1)
    return norms


def add_moments(sums: Tensor, values: Tensor, weights: Tensor) -> None:
    """Add a batch to sums over tokens, in place: of 1, of the values and of their squares.

    Tokens with a value that is not finite (float16 overflows) are left out.

    Args:
        sums: float64 [3, m]; what is summed by two ranks, or two runs, may be added.
        values: float32 [N, m].
        weights: what each token counts for, float32 [N]: 0 for padding.
    """
    finite = values.isfinite().all(dim=1, keepdim=True)
    values, weights = torch.where(finite, values, 0), torch.where(finite, weights.unsqueeze(1), 0)
    tokens = weights.sum()
    mean = (values * weights).sum(0) / tokens.clamp(min=1)
    # Squared around the batch's mean: a large mean would drown in float32 what fluctuates around it.
    scatter = ((values - mean).square() * weights).sum(0).to(sums.dtype)
    tokens, mean = tokens.to(sums.dtype), mean.to(sums.dtype)
    sums += torch.stack([tokens.expand_as(mean), tokens * mean, scatter + tokens * mean.square()])


def activation_scores(sums: Tensor, metric: Metric, rows: int, column_norms: Tensor | None) -> Tensor:
    """The score [S, n] of every unit from its activation a_u, with the columns W_u that read it where they weigh in.

    mean: E ||a_u||_2 * ||W_u||_F (Minitron, arXiv 2407.14679, section 2.2; weighted as by Wanda, arXiv 2306.11695);
    l2: sqrt(E ||a_u||^2) * ||W_u||_F; fluctuation: sum over the unit's columns j of Var(a_j) * ||W_j||^2 (FLAP, arXiv
    2312.11983, section 3.2).

    Args:
        sums: [3, S, n] of the units' magnitudes; for the fluctuation [3, S, m] of the columns. See `add_moments`.
        metric: which of these scores.
        rows: columns of each unit.
        column_norms: ||W_j|| [S, m] or [m]; None for 1.
    """
    tokens = sums[0].clamp(min=1)
    mean, mean_square = sums[1] / tokens, sums[2] / tokens
    if metric == "fluctuation":
        fluctuation = (mean_square - mean.square()).clamp(min=0)
        if column_norms is not None:
            fluctuation = fluctuation * column_norms.square()
        return torch.unflatten(fluctuation, -1, (-1, rows)).sum(-1)
    score = mean if metric == "mean" else mean_square.sqrt()
    return score if column_norms is None else score * magnitudes(column_norms, rows)


def of_groups(head_scores: Tensor, heads_per_group: int) -> Tensor:
    """The score [..., G] of a key-value group: what its query heads [..., H] score together."""
    return torch.unflatten(head_scores, -1, (-1, heads_per_group)).sum(-1)


def highest(scores: Tensor, count: int) -> list[int]:
    """The `count` units with the highest `scores` [n], ascending; of equal ones the earlier stay."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def highest_heads(head_scores: Tensor, group_scores: Tensor, target: Shape) -> list[int]:
    """The heads that stay: the best of each of the best groups, as many groups and heads as `target` has.

    Args:
        head_scores: of a layer's query heads [H], group after group.
        group_scores: of its key-value groups [G].
        target: the counts that stay.
    """
    of_group = torch.unflatten(head_scores, 0, (len(group_scores), -1))
    return [
        group * of_group.shape[1] + head
        for group in highest(group_scores, target.kv_groups)
        for head in highest(of_group[group], target.heads_per_group)
    ]


def highest_mask(scores: Tensor, count: int) -> Tensor:
    """1 for the `count` units with the highest `scores` [..., n], 0 for the others; of equal ones the earlier stay."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(-1, order[..., :count], 1.0)


def highest_heads_mask(head_scores: Tensor, heads_per_group: int, target: Shape) -> Tensor:
    """1 for the heads [..., H] that `highest_heads` keeps, where groups score what their heads score together."""
    of_group = torch.unflatten(head_scores, -1, (-1, heads_per_group))
    groups = highest_mask(of_groups(head_scores, heads_per_group), target.kv_groups)
    return (highest_mask(of_group, target.heads_per_group) * groups.unsqueeze(-1)).flatten(-2)


def rounded(scores: Tensor) -> object:
    """Scores as nested lists of numbers with four significant digits, for JSON."""

    def shortened(values: object) -> object:
        return [shortened(value) for value in values] if isinstance(values, list) else float(f"{values:.4g}")

    return shortened(scores.tolist())


def spread(scores: Sequence[float] | Tensor) -> dict[str, float]:
    """The least, the mean and the greatest of some scores, to log."""
    values = torch.as_tensor(scores).cpu().double()
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
