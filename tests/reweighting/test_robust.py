"""The rules against a general solver, against closed forms and against their stated bounds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from lightprune.reweighting.robust import divergence, scale_reference, sheared_weights, worst_case_weights

Array = NDArray[np.float64]


def draw_case(rng: np.random.Generator) -> tuple[Array, Array, float]:
    """Excess, ratio and radius of a few domains; some radii are so large that their ball holds a vertex."""
    domains = int(rng.integers(2, 9))
    ratio = rng.dirichlet(np.full(domains, 2.0)) + 0.01
    return rng.normal(0.2, 0.5, domains), ratio / ratio.sum(), float(10 ** rng.uniform(-2.5, 0.7))


def general_solution(excess: Array, ratio: Array, radius: float) -> Array:
    """The best mixture that scipy's SLSQP finds from several starts, knowing nothing of the problem's form."""
    constraints = [
        {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones_like(q)},
        {
            "type": "ineq",
            "fun": lambda q: radius - 0.5 * np.sum(ratio * (q / ratio - 1) ** 2),
            "jac": lambda q: -(q / ratio - 1),
        },
    ]
    starts = [ratio, *(0.7 * ratio + 0.3 * vertex for vertex in np.eye(len(ratio)))]
    found = [
        minimize(
            lambda q: -q @ excess,
            start,
            jac=lambda q: -excess,
            method="SLSQP",
            bounds=[(0, 1)] * len(ratio),
            constraints=constraints,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        for start in starts
    ]
    feasible = [result.x for result in found if divergence(result.x, ratio) <= radius + 1e-8]
    return np.asarray(max(feasible, key=lambda q: float(q @ excess)))


def test_without_a_floor_it_solves_the_problem_of_the_ball() -> None:
    rng = np.random.default_rng(0)
    at_a_vertex = 0
    for _ in range(200):
        excess, ratio, radius = draw_case(rng)
        weights = worst_case_weights(excess, ratio, radius, floor=0.0)
        np.testing.assert_allclose(weights, general_solution(excess, ratio, radius), atol=1e-4)
        at_a_vertex += weights.max() > 1 - 1e-9
    assert 10 < at_a_vertex < 190


def test_with_a_floor_it_is_the_stated_form_on_the_ball() -> None:
    """Solved again for η by a plain scan over the formula of the docstring."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        excess, ratio, radius = draw_case(rng)
        weights = worst_case_weights(excess, ratio, radius, floor=0.2)
        assert weights.sum() == pytest.approx(1)
        boost = weights / ratio
        # Renormalizing takes all boosts down by one factor, which the floored ones show.
        raw = boost * 0.2 / boost.min() if boost.min() < 0.2 else None
        reached = divergence(weights, ratio)
        if reached < radius - 1e-9:
            inside += 1
            highest = np.zeros_like(ratio)
            highest[excess.argmax()] = 1
            expected = np.maximum(highest, 0.2 * ratio)
            np.testing.assert_allclose(weights, expected / expected.sum(), atol=1e-9)
            continue
        assert reached == pytest.approx(radius, rel=1e-6)
        if raw is not None:  # the others are linear in the excess
            free = raw > 0.2 + 1e-9
            if free.sum() > 2:
                line = np.polyfit(excess[free], raw[free], 1)
                np.testing.assert_allclose(np.polyval(line, excess[free]), raw[free], atol=1e-6)
                assert line[0] > 0
    assert 0 < inside < 60


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 1)), min_size=2, max_size=8),
    st.floats(1e-3, 5),
    st.floats(0, 0.9),
)
def test_no_boost_exceeds_its_bound(domains: list[tuple[float, float]], radius: float, floor: float) -> None:
    excess, ratio = np.array(domains).T
    ratio = ratio / ratio.sum()
    weights = worst_case_weights(excess, ratio, radius, floor)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert divergence(weights, ratio) <= radius * (1 + 1e-6)
    assert (weights / ratio <= 1 + np.sqrt(2 * radius / ratio) + 1e-6).all()


def test_more_excess_never_means_less_boost() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        excess, ratio, radius = draw_case(rng)
        boost = (worst_case_weights(excess, ratio, radius, 0.2) / ratio)[excess.argsort()]
        assert (np.diff(boost) >= -1e-9).all()


def test_equal_excess_gives_the_ratio_and_a_tie_is_shared() -> None:
    ratio = np.array([0.2, 0.3, 0.5])
    assert (worst_case_weights(np.full(3, 0.7), ratio, 0.1, 0.2) == ratio).all()
    # A huge ball: all weight to the two highest, in the proportion of their ratios.
    np.testing.assert_allclose(worst_case_weights(np.array([1.0, 1.0, 0.0]), ratio, 100, 0.0), [0.4, 0.6, 0])


def test_scale_and_zero_of_the_excess_do_not_matter() -> None:
    excess, ratio = np.array([0.1, 0.5, 0.3]), np.array([0.2, 0.3, 0.5])
    weights = worst_case_weights(excess, ratio, 0.1, 0.2)
    np.testing.assert_allclose(worst_case_weights(1e-7 * excess + 3, ratio, 0.1, 0.2), weights, rtol=1e-6)


def test_a_domain_out_of_the_mixture_stays_out() -> None:
    ratio = np.array([0.5, 0.0, 0.5])
    weights = worst_case_weights(np.array([0.1, 9.0, 0.3]), ratio, 0.1, 0.2)
    assert weights[1] == 0
    np.testing.assert_allclose(
        weights[[0, 2]], worst_case_weights(np.array([0.1, 0.3]), np.array([0.5, 0.5]), 0.1, 0.2), atol=1e-12
    )
    assert sheared_weights(ratio, np.array([0.1, 900.0, 0.3]))[1] == 0


def test_two_domains_in_closed_form() -> None:
    """q₁ = p₁ + sqrt(2 ρ p₁ p₂) puts the divergence at ρ."""
    ratio = np.array([0.3, 0.7])
    weights = worst_case_weights(np.array([2.0, 1.0]), ratio, 0.05, 0.0)
    assert weights[0] == pytest.approx(0.3 + math.sqrt(2 * 0.05 * 0.3 * 0.7))


@pytest.mark.parametrize(
    ("losses", "factor"),
    [([2.5, 1.0], 1.0), ([2.0, 2.9], 0.9), ([1.75, 2.0], 0.8), ([0.1, 0.1], 0.0), ([0.0, 0.0], 0.0)],
)
def test_references_are_scaled_until_one_is_exceeded(losses: list[float], factor: float) -> None:
    reference = np.array([2.0, 3.0])
    np.testing.assert_allclose(scale_reference(np.array(losses), reference), factor * reference)


def test_sheared_weights_equal_a_loop() -> None:
    weights, excess = [0.5, 0.2, 0.3], [0.3, -0.1, 0.0]
    grown = [q * math.exp(x) for q, x in zip(weights, excess, strict=True)]
    expected = [(1 - 1e-4) * g / sum(grown) + 1e-4 / 3 for g in grown]
    np.testing.assert_allclose(sheared_weights(np.array(weights), np.array(excess)), expected, rtol=1e-12)
