"""The fit against curves whose parameters are known, against finite differences, and against garbage."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import approx_fprime

from lightprune.reweighting.scaling_law import ScalingLaw, fit_scaling_laws, huber_objective, predicted_loss

NO_SPARSITY = np.zeros(64)


def curve(law: ScalingLaw, tokens: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    return np.array([law(t, s) for t, s in zip(tokens, sparsity, strict=True)])


def test_the_law_by_hand() -> None:
    law = ScalingLaw(a=3.0, beta=0.25, gamma=-0.5, e=math.log(1.5))
    assert law(10_000, 0.25) == pytest.approx(math.e**3 / 10 * 0.5 + 1.5)


def test_the_gradient_equals_finite_differences() -> None:
    rng = np.random.default_rng(0)
    features, log_losses = rng.normal(size=(20, 2)), rng.normal(1, 0.3, 20)
    log_losses[:10] = 0.9  # some residuals within the quadratic part
    for parameters in (np.array([0.5, 0.1, 0.3, -0.4]), np.array([-2.0, 0.9, 0.0, 0.0]), np.array([3, -1, 1, 0.5])):
        objective = lambda x: huber_objective(x, features, log_losses)[0]  # noqa: E731
        _, gradient = huber_objective(parameters, features, log_losses)
        np.testing.assert_allclose(gradient, approx_fprime(parameters, objective, 1e-8), atol=1e-5)


def test_it_recovers_the_parameters_of_exact_curves() -> None:
    rng = np.random.default_rng(1)
    tokens, sparsity = np.geomspace(1e4, 3e6, 60), np.linspace(0.02, 0.6, 60) ** 2
    for _ in range(10):
        truth = ScalingLaw(rng.uniform(3, 5), rng.uniform(0.3, 0.6), rng.uniform(-0.5, -0.2), rng.uniform(0.2, 0.9))
        plain = ScalingLaw(truth.a, truth.beta, 0.0, truth.e)
        for law, shares in ((truth, sparsity), (plain, np.zeros(60))):
            best, *_ = fit_scaling_laws(tokens, shares, curve(law, tokens, shares))
            for name in ("a", "beta", "gamma", "e"):
                assert getattr(best, name) == pytest.approx(getattr(law, name), rel=0.05, abs=0.02)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.002, 0.01), (0.01, 0.03)])
def test_it_predicts_the_end_of_noisy_curves(noise: float, tolerance: float) -> None:
    """From the first 60% of the run; a tenth of the points are off by a factor."""
    rng = np.random.default_rng(2)
    tokens = np.linspace(5e4, 2e6, 100)
    for _ in range(20):
        law = ScalingLaw(rng.uniform(3, 5), rng.uniform(0.3, 0.6), 0.0, rng.uniform(0.2, 0.9))
        exact = curve(law, tokens, np.zeros(100))
        seen = exact[:60] * np.exp(noise * rng.standard_normal(60))
        seen[::10] *= 1.3
        predicted = predicted_loss(tokens[:60], np.zeros(60), seen, final_tokens=2e6, final_sparsity=0.0)
        assert predicted == pytest.approx(exact[-1], rel=tolerance)


def test_it_predicts_the_target_sparsity() -> None:
    """Pruning outweighs training here, so that the loss rises; uncapped, the laws see where to."""
    rng = np.random.default_rng(3)
    law = ScalingLaw(4.0, 0.3, -0.3, 0.5)
    tokens, sparsity = np.linspace(5e4, 2e6, 100), np.minimum(np.linspace(0.01, 1, 100), 0.5)
    seen = curve(law, tokens, sparsity)[:60] * np.exp(0.003 * rng.standard_normal(60))
    for fitted in fit_scaling_laws(tokens[:60], sparsity[:60], seen):
        assert fitted(2e6, 0.5) == pytest.approx(law(2e6, 0.5), rel=0.03)


def test_never_above_the_lowest_loss_seen() -> None:
    tokens = np.linspace(1e4, 1e6, 40)
    rising = 2 + 1e-6 * tokens
    predicted = predicted_loss(tokens, NO_SPARSITY[:40], rising, final_tokens=2e6, final_sparsity=0.0)
    assert predicted is not None
    assert predicted <= rising.min()


def test_sparsity_counts_only_where_it_says_something() -> None:
    tokens = np.geomspace(1e4, 1e6, 40)
    losses = curve(ScalingLaw(4.0, 0.4, 0.0, 0.5), tokens, NO_SPARSITY[:40])
    stepped = np.where(np.arange(40) < 20, 0.0, 0.3)  # a cut without masks: 0, then constant
    for sparsity in (NO_SPARSITY[:40], np.full(40, 0.3), stepped):
        best, *_ = fit_scaling_laws(tokens, sparsity, losses)
        assert best.gamma == 0
        assert best(2e6, 0.0) == pytest.approx(np.exp(4.0 - 0.4 * np.log(2e6)) + np.exp(0.5), rel=1e-3)


def test_too_few_points_give_no_fit() -> None:
    tokens = np.linspace(1e4, 1e6, 11)
    losses = 3 - 1e-6 * tokens
    assert predicted_loss(tokens, NO_SPARSITY[:11], losses, final_tokens=2e6, final_sparsity=0) is not None
    losses[3] = np.nan
    assert predicted_loss(tokens, NO_SPARSITY[:11], losses, final_tokens=2e6, final_sparsity=0) is None


ODD = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([0.0, 1.0, -1.0, 2.5, math.nan, math.inf]),
)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.just(3), st.integers(0, 24)), elements=ODD), ODD, ODD)
@example(np.ones((3, 20)), 1.0, 0.0)
@example(np.stack([np.full(20, 1e300), np.zeros(20), np.geomspace(1e-300, 1e300, 20)]), 1e308, 0.5)
@example(np.stack([np.arange(20.0), np.zeros(20), np.tile([1e-9, 1e9], 10)]), 1e9, 0.0)
def test_it_never_raises(points: np.ndarray, final_tokens: float, final_sparsity: float) -> None:
    tokens, sparsity, losses = points
    predicted = predicted_loss(tokens, sparsity, losses, final_tokens=final_tokens, final_sparsity=final_sparsity)
    if predicted is not None:
        assert 0 <= predicted <= losses[np.isfinite(losses) & (losses > 0)].min()
