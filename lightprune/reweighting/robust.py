"""Mixture weights from excess losses: the pure functions.

Shapes: [D] float64, one entry for each domain. The excess of a domain is its loss minus its reference loss, in nats per
token. A domain of ratio 0 is out of the mixture and stays out, whatever its excess.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SMOOTHING = 1e-4
"""The share of the uniform mixture, over the domains that are in use, in Sheared LLaMA's rule."""

_HALVINGS = 100
"""Of the interval that holds η: more than float64 can tell apart."""


def divergence(weights: Array, ratio: Array) -> float:
    """The chi-square divergence of the weights q [D] from the ratio p [D], ½ Σ p (q/p − 1)²."""
    used = ratio > 0
    return float(0.5 * np.sum((weights[used] - ratio[used]) ** 2 / ratio[used]))


def worst_case_weights(excess: Array, ratio: Array, radius: float, floor: float) -> Array:
    """The mixture q around the ratio p under which the excess x is worst (DRPruning, arXiv 2411.14055).

    Without a floor this is exactly the solution of

        max Σ q x   over the simplex   with   ½ Σ p (q/p − 1)² ≤ ρ

    which has the form q ∝ p·relu(x − η), with η such that the divergence is ρ. Where ρ is so large that the ball holds
    the vertex, all weight goes to the domain of the highest excess (by p to several that tie). Equal excess makes all
    mixtures equal, and gives p.

    The floor f adds that no domain is starved: q ∝ p·max(r, f), with r = relu(x − η) / Σ p·relu(x − η) the boost
    without it. η is then found for what results, which so lies on the ball too. In either case a domain's boost q/p is
    at most 1 + sqrt(2ρ/p).

    Args:
        excess: x [D], finite, in nats per token.
        ratio: p [D], the reference mixture; at least 0, sum 1.
        radius: ρ, above 0.
        floor: f, in [0, 1).

    Returns:
        q [D], sum 1.
    """
    weights = np.zeros_like(ratio)
    used = ratio > 0
    p, x = ratio[used], excess[used]
    spread = x.max() - x.min()
    if spread <= 0:
        return ratio.copy()
    x = (x - x.max()) / spread  # q does not change with the scale of x, or where its zero lies

    def mixture(boost: Array) -> Array:
        q = p * np.maximum(boost / np.sum(p * boost), floor)
        return np.asarray(q / q.sum())

    best = mixture((x == 0).astype(np.float64))  # the limit as η goes to the highest excess
    if divergence(best, p) > radius:
        # Below the lowest excess the divergence is ½ Var(x) / (mean − η)², or less with a floor: at most ρ at `low`.
        mean = np.sum(p * x)
        low, high = min(-1.0, mean - np.sqrt(np.sum(p * (x - mean) ** 2) / (2 * radius))), 0.0
        for _ in range(_HALVINGS):
            eta = (low + high) / 2
            if eta in (low, high):
                break
            low, high = (low, eta) if divergence(mixture(np.maximum(x - eta, 0)), p) > radius else (eta, high)
        best = mixture(np.maximum(x - low, 0))
    weights[used] = best
    return weights


def scale_reference(losses: Array, reference: Array) -> Array:
    """The reference losses [D], or where no loss [D] exceeds its own: times the first of 0.9, 0.8, … where one does."""
    for tenths in range(10, 0, -1):
        scaled = reference * (tenths / 10)
        if np.any(losses > scaled):
            return scaled
    return np.zeros_like(reference)


def sheared_weights(weights: Array, excess: Array) -> Array:
    """The rule of Sheared LLaMA (arXiv 2310.06694, algorithm 1): q ∝ q·exp(x), with a little of the uniform mixture.

    Unlike `worst_case_weights` it moves on from the weights of before, without a bound. As in the authors' code, and
    unlike in their algorithm, an excess below 0 lowers a weight.

    Args:
        weights: q [D] before; at least 0, sum 1.
        excess: x [D], finite, in nats per token.

    Returns:
        q [D], sum 1.
    """
    used = weights > 0
    grown = weights * np.exp(np.where(used, excess - excess[used].max(), -np.inf))
    return np.asarray((1 - _SMOOTHING) * grown / grown.sum() + _SMOOTHING * used / used.sum())
