import numpy as np

from lightprune.reweighting.ratio import follow


def test_without_a_bound_in_reach_it_is_a_running_mean() -> None:
    initial = np.array([0.2, 0.5, 0.3])
    moved = follow(np.array([0.25, 0.4, 0.35]), np.array([0.3, 0.45, 0.25]), initial)
    np.testing.assert_allclose(moved, [0.255, 0.405, 0.34])


def test_it_follows_a_plain_loop_into_its_bounds() -> None:
    initial, weights = [0.1, 0.25, 0.65], [0.9, 0.05, 0.05]
    ratio, expected = np.array(initial), list(initial)
    for _ in range(100):
        ratio = follow(ratio, np.array(weights), np.array(initial))
        moved = [0.9 * p + 0.1 * q for p, q in zip(expected, weights, strict=True)]
        near = [min(max(m, i / 2), 2 * i) for m, i in zip(moved, initial, strict=True)]
        within = [min(max(n / sum(near), 0.1), 0.65) for n in near]
        expected = [w / sum(within) for w in within]
        np.testing.assert_allclose(ratio, expected, rtol=1e-12)
    # It has come to a bound: 2 * 0.1, up to the renormalization. Unbounded it would be 0.9.
    assert 0.19 < ratio[0] < 0.25


def test_a_domain_out_of_the_mixture_stays_out_and_sets_no_bound() -> None:
    initial = np.array([0.0, 0.4, 0.6])
    moved = follow(initial, np.array([0.0, 0.5, 0.5]), initial)
    # Both within the initial least and greatest, of which the absent domain is none.
    np.testing.assert_allclose(moved, [0, 0.41, 0.59])
    pulled = follow(np.array([0.0, 0.4, 0.6]), np.array([0.0, 0.1, 0.9]), initial)
    np.testing.assert_allclose(pulled, [0, 0.4, 0.6])
