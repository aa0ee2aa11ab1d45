from typing import Any

import numpy as np
import pytest

from lightprune.reweighting.mixer import Mixer
from lightprune.reweighting.ratio import follow
from lightprune.reweighting.robust import sheared_weights, worst_case_weights

P = np.array([0.2, 0.3, 0.5])
LOSSES, REFERENCE = np.array([2.0, 3.5, 3.0]), np.array([1.9, 3.0, 2.9])


def mixer(**options: Any) -> Mixer:
    return Mixer(P, **{"rule": "robust", "radius": 0.1, "floor": 0.2, "dynamic_ratio": False} | options)


def test_robust() -> None:
    mixed = mixer()
    compared = mixed.update(LOSSES, REFERENCE, 0.5)
    np.testing.assert_allclose(compared.excess, [0.1, 0.5, 0.1])
    np.testing.assert_array_equal(mixed.weights, worst_case_weights(LOSSES - REFERENCE, P, 0.1, 0.2))
    assert (mixed.ratio == P).all()
    assert mixed.weights.argmax() == 1


def test_where_no_excess_is_positive_the_references_are_scaled() -> None:
    compared = mixer().update(LOSSES, LOSSES + np.array([1.0, 0.2, 0.4]), 0.5)
    np.testing.assert_allclose(compared.reference, 0.9 * (LOSSES + np.array([1.0, 0.2, 0.4])))


def test_sheared_moves_on_from_its_own_weights() -> None:
    mixed = mixer(rule="sheared")
    mixed.update(LOSSES, REFERENCE, 0.5)
    mixed.update(LOSSES, REFERENCE, 0.6)
    excess = LOSSES - REFERENCE
    np.testing.assert_array_equal(mixed.weights, sheared_weights(sheared_weights(P, excess), excess))


def test_constant_compares_and_moves_nothing() -> None:
    mixed = mixer(rule="constant")
    compared = mixed.update(LOSSES, REFERENCE, 0.5)
    np.testing.assert_array_equal(compared.excess, LOSSES - REFERENCE)
    assert (mixed.weights == P).all()


def test_the_ratio_follows_from_a_fifth_of_the_steps_on() -> None:
    mixed = mixer(dynamic_ratio=True)
    mixed.update(LOSSES, REFERENCE, 0.19)
    assert (mixed.ratio == P).all()
    mixed.update(LOSSES, REFERENCE, 0.2)
    np.testing.assert_array_equal(mixed.ratio, follow(P, mixed.weights, P))
    assert mixed.ratio[1] > P[1]


@pytest.mark.parametrize("rule", ["robust", "sheared"])
def test_a_domain_without_a_loss_counts_as_the_mean_of_the_others(rule: str) -> None:
    mixed = mixer(rule=rule)
    compared = mixed.update(np.array([2.0, np.nan, 3.0]), np.array([1.5, 3.0, 2.9]), 0.5)
    assert np.isnan(compared.excess[1])
    mean = (0.2 * 0.5 + 0.5 * 0.1) / 0.7
    same = mixer(rule=rule)
    same.update(np.array([2.0, 3.0 + mean, 3.0]), np.array([1.5, 3.0, 2.9]), 0.5)
    np.testing.assert_allclose(mixed.weights, same.weights)


@pytest.mark.parametrize("reference", [None, np.full(3, np.nan)])
def test_without_a_reference_nothing_moves(reference: Any) -> None:
    mixed = mixer()
    compared = mixed.update(LOSSES, reference, 0.5)
    assert (mixed.weights == P).all()
    assert np.isnan(compared.excess).all()


def test_it_goes_on_from_its_state() -> None:
    one, other = mixer(dynamic_ratio=True), mixer(dynamic_ratio=True)
    one.update(LOSSES, REFERENCE, 0.5)
    other.load_state_dict(one.state_dict())
    for mixed in (one, other):
        mixed.update(LOSSES[::-1], REFERENCE, 0.6)
    assert one.state_dict() == other.state_dict()
