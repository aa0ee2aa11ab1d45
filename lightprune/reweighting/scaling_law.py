"""The scaling law of a domain's loss in tokens and sparsity, fitted to a run's own history, and its prediction.

Shapes: n points, P parameters.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import huber

from lightprune.reweighting.robust import Array

MIN_POINTS = 11
"""A fit needs more than ten points."""

_HUBER = 1e-3
_SCREENED, _REFINED = 8, 3
_SCREENING_STEPS, _REFINING_STEPS = 20, 200


@dataclass(frozen=True)
class ScalingLaw:
    """L(T, s) = exp(a − β ln T − γ ln s) + exp(e), in nats per token (DRPruning, arXiv 2411.14055)."""

    a: float
    beta: float
    gamma: float
    e: float

    def __call__(self, tokens: float, sparsity: float) -> float:
        """The loss after so many tokens at that sparsity; where γ is 0 the sparsity does not matter."""
        by_sparsity = self.gamma * np.log(sparsity) if self.gamma else 0.0
        return float(np.exp(self.a - self.beta * np.log(tokens) - by_sparsity) + np.exp(self.e))


def predicted_loss(
    tokens: Array, sparsity: Array, losses: Array, *, final_tokens: float, final_sparsity: float
) -> float | None:
    """The loss at the end of training: the mean of the best fits' predictions, never above the lowest loss seen.

    Args:
        tokens: [n] that the domain had trained by then.
        sparsity: [n] of the model, in [0, 1).
        losses: [n] of the domain, in nats per token.
        final_tokens: tokens at the end of training.
        final_sparsity: sparsity at the end of training.

    Returns:
        The loss in nats per token; None where there are too few points that can be used, or no fit is finite.
    """
    fitted = fit_scaling_laws(tokens, sparsity, losses)
    usable = losses[np.isfinite(losses) & (losses > 0)]
    with np.errstate(all="ignore"):
        final_sparsity = final_sparsity if final_sparsity > 0 else float(np.nan)  # asked for only where γ is not 0
        predictions = [law(final_tokens, final_sparsity) for law in fitted]
    finite = [loss for loss in predictions if np.isfinite(loss)]
    return min(float(np.mean(finite)), float(usable.min())) if finite else None


def fit_scaling_laws(tokens: Array, sparsity: Array, losses: Array) -> list[ScalingLaw]:
    """The three best fits, best first.

    As Chinchilla does (arXiv 2203.15556, D.3), it minimizes the Huber loss (δ = 1e-3) of ln L̂ − ln L, with ln L̂ as a
    log-sum-exp, by L-BFGS from a grid of starts. (DRPruning's code takes the Huber loss of L̂ − L.) The best starts of
    the grid are screened by a few steps each, and the three that then lead are refined until they converge.

    Points that are not finite or not positive are left out. Sparsity is left out of the law, γ = 0, where it says
    nothing: unless it is above 0, and not always the same, in more than ten points. If it is, the others are left out.

    Returns:
        At most three laws; none where fewer than eleven points can be used.
    """
    usable = np.isfinite(tokens) & np.isfinite(losses) & (tokens > 0) & (losses > 0)
    sparse = usable & np.isfinite(sparsity) & (sparsity > 0)
    with_sparsity = sparse.sum() >= MIN_POINTS and np.ptp(sparsity[sparse]) > 0
    chosen = sparse if with_sparsity else usable
    if chosen.sum() < MIN_POINTS:
        return []
    columns = [np.log(tokens[chosen])] + ([np.log(sparsity[chosen])] if with_sparsity else [])
    features = np.stack(columns, axis=1)
    # Around the mean of the points, a and β hardly depend on each other, and all parameters are of the order of 1.
    center = features.mean(axis=0)
    fits = _best_fits(features - center, np.log(losses[chosen]))
    return [_law(parameters, center) for parameters in fits if np.isfinite(parameters).all()]


def huber_objective(parameters: Array, features: Array, log_losses: Array) -> tuple[float, Array]:
    """The mean Huber loss of the residuals in ln L, divided by δ, and its gradient [P].

    Args:
        parameters: [P], a, e, and an exponent for each feature.
        features: [n, P − 2], logarithms of tokens (and sparsity).
        log_losses: [n].
    """
    reducible = parameters[0] - features @ parameters[2:]
    predicted = np.logaddexp(reducible, parameters[1])
    residuals = predicted - log_losses
    losses = huber(_HUBER, residuals) / _HUBER
    slopes = np.clip(residuals / _HUBER, -1, 1) / len(residuals)
    share = np.exp(reducible - predicted)  # of the reducible part in the loss
    by_reducible = slopes * share
    gradient = np.concatenate([[by_reducible.sum(), np.sum(slopes * (1 - share))], -(by_reducible @ features)])
    return float(losses.mean()), gradient


def _best_fits(features: Array, log_losses: Array) -> list[Array]:
    with np.errstate(all="ignore"):
        starts = sorted(_starts(features, log_losses), key=lambda x: huber_objective(x, features, log_losses)[0])
        screened = [_minimized(start, features, log_losses, _SCREENING_STEPS) for start in starts[:_SCREENED]]
        leading = [parameters for _, parameters in sorted(screened, key=lambda fit: fit[0])[:_REFINED]]
        refined = [_minimized(parameters, features, log_losses, _REFINING_STEPS) for parameters in leading]
    return [parameters for _, parameters in sorted(refined, key=lambda fit: fit[0])]


def _starts(features: Array, log_losses: Array) -> list[Array]:
    """A grid: how much of the loss cannot be reduced, how fast the rest falls with tokens and grows with sparsity."""
    lowest, middle = np.exp(log_losses.min()), np.exp(np.median(log_losses))
    exponents = [(0.1, 0.5, 1.0, 2.0), (0.0, -0.5, -1.0)][: features.shape[1]]
    return [
        np.array([np.log(middle - share * lowest), np.log(share * lowest), *powers])
        for share, *powers in product((0.1, 0.5, 0.8, 0.95), *exponents)
    ]


def _minimized(start: Array, features: Array, log_losses: Array, steps: int) -> tuple[float, Array]:
    result = minimize(
        huber_objective,
        start,
        args=(features, log_losses),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": steps, "ftol": 1e-12, "gtol": 1e-8},
    )
    value = float(result.fun)
    found: NDArray[np.float64] = result.x
    return (value if np.isfinite(value) else np.inf), found


def _law(parameters: Array, center: Array) -> ScalingLaw:
    a, e, *exponents = parameters.tolist()
    beta, gamma = (*exponents, 0.0)[:2]
    return ScalingLaw(a=a + float(center @ exponents), beta=beta, gamma=gamma, e=e)
