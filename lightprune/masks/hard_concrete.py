"""Hard-concrete masks: random numbers in [0, 1] that are exactly 0 or 1 with positive probability. Pure functions.

The distribution is that of Louizos et al. (arXiv 1712.01312, section 2.2), with their constants; clamp, evaluation and
Lagrangian are those of Sheared LLaMA (arXiv 2310.06694), which DRPruning (arXiv 2411.14055) takes over. All tensors are
float32 or wider, whatever the model computes in. A mask's logit is the log odds of its concrete variable.
"""

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1  # gamma and zeta, the ends of the interval that is clipped to [0, 1]
TEMPERATURE = 2 / 3  # beta
LIMIT = math.log(100)  # logits stay in [-LIMIT, LIMIT]: beyond, their gradient is lost
# Sheared LLaMA draws the first logits from N(5, 0.01) and clamps them: all of them begin at the limit.
INITIAL = LIMIT
MAGICAL = 0.8  # by this the logits are tempered at evaluation


def sample(logits: Tensor, noise: Tensor) -> Tensor:
    """A draw z in [0, 1] for each logit: clip(s (zeta - gamma) + gamma) with s = sigmoid((logit(u) + logit) / beta).

    By inversion, so that the noise is the quantile of the draw.

    Args:
        logits: of any shape.
        noise: u, uniform in (0, 1), of the same shape.
    """
    return quantile(noise, logits).clamp(0, 1)


def quantile(p: Tensor, logits: Tensor) -> Tensor:
    """The x with P(stretched variable <= x) = p, for p in (0, 1)."""
    return torch.sigmoid((torch.logit(p) + logits) / TEMPERATURE) * (HIGH - LOW) + LOW


def probability_open(logits: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(logit - beta log(-gamma / zeta)): the expected l0 norm (Louizos et al., section 2.2)."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def deterministic(logits: Tensor, open_count: int) -> Tensor:
    """The masks [..., n] of evaluation: sigmoid(0.8 logit / beta), and exactly 0 but for the `open_count` highest.

    The choice is made along the last dimension; of equal logits the earlier stay.
    """
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)
    stays = torch.zeros_like(logits).scatter(-1, order[..., :open_count], 1.0)
    return torch.sigmoid(logits / TEMPERATURE * MAGICAL) * stays


def lagrangian(sparsity: Tensor, target: float, lambda_1: Tensor, lambda_2: Tensor) -> Tensor:
    """mean over rows of lambda_1 (s - t) + lambda_2 (s - t)^2; the masks descend on it, the multipliers ascend.

    Args:
        sparsity: s, the expected share of closed masks in each row (each layer) [rows].
        target: t.
        lambda_1: first multiplier [].
        lambda_2: second multiplier [].
    """
    excess = sparsity - target
    return (lambda_1 * excess + lambda_2 * excess.square()).mean()
