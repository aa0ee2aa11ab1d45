from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from lightprune.reweighting.references import DynamicReference, FixedReference, Observation
from lightprune.reweighting.scaling_law import predicted_loss

STEPS = 100


def observation(step: int, losses: list[float] | None = None) -> Observation:
    """After `step` of 100 steps of 1000 tokens for each of two domains, one harder than the other."""
    tokens = np.full(2, 1000.0 * step)
    falling = np.array([1.0, 2.0]) + 20 * tokens**-0.4
    found = falling if losses is None else np.array(losses)
    return Observation(step / STEPS, found, tokens, 0.0, tokens * (STEPS / step), 0.0)


@pytest.fixture
def dynamic() -> Iterator[DynamicReference]:
    reference = DynamicReference()
    yield reference
    reference.close()


def test_a_fixed_reference_stays() -> None:
    reference = FixedReference(np.array([1.0, 2.0]))
    assert reference.update(observation(1)) is reference.update(observation(50)) is reference.losses


def test_the_first_fit_comes_one_update_after_it_began(dynamic: DynamicReference) -> None:
    # Points from step 2 on; the eleventh is step 12, which is behind 10% of the steps.
    found = {step: dynamic.update(observation(step)) for step in range(1, 16)}
    assert [step for step, losses in found.items() if losses is None] == list(range(1, 13))
    points = [observation(step) for step in range(2, 13)]
    for domain in range(2):
        expected = predicted_loss(
            np.array([point.tokens[domain] for point in points]),
            np.zeros(11),
            np.array([point.losses[domain] for point in points]),
            final_tokens=100_000.0,
            final_sparsity=0.0,
        )
        assert found[13] is not None
        assert found[13][domain] == expected
        assert found[13][domain] == pytest.approx(observation(STEPS).losses[domain], rel=0.01)


def test_later_fits_only_lower_it(dynamic: DynamicReference) -> None:
    for step in range(1, 14):
        dynamic.update(observation(step))
    first = dynamic.losses
    assert first is not None
    for step in range(14, 34):  # the loss stops falling, and predictions rise
        later = dynamic.update(observation(step, losses=[9.0, 1.5 - step / 100]))
        assert later is not None
        assert (later <= first).all()
    assert later[0] == pytest.approx(first[0], abs=0.1)
    assert later[1] < 1.2


def test_a_domain_without_a_usable_curve_has_its_lowest_loss(dynamic: DynamicReference) -> None:
    for step in range(1, 15):
        rare = 3.0 + step if step in (5, 9) else np.nan
        losses = dynamic.update(observation(step, losses=[2.0, rare]))
    assert losses is not None
    assert losses[1] == 8.0


def test_a_domain_that_was_never_seen_has_none(dynamic: DynamicReference) -> None:
    for step in range(1, 15):
        losses = dynamic.update(observation(step, losses=[2.0, np.nan]))
    assert losses is not None
    assert np.isnan(losses[1])


@pytest.mark.parametrize("at", [5, 12, 13])
def test_it_goes_on_from_its_state(dynamic: DynamicReference, at: int) -> None:
    for step in range(1, at + 1):
        dynamic.update(observation(step))
    resumed = DynamicReference()
    resumed.load_state_dict(dynamic.state_dict())
    for step in range(at + 1, 17):
        expected, found = dynamic.update(observation(step)), resumed.update(observation(step))
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            assert (expected == found).all()
    assert resumed.state_dict() == dynamic.state_dict()
    resumed.close()


def test_its_state_is_bounded(dynamic: DynamicReference) -> None:
    for step in range(1, 200):
        dynamic.update(replace(observation(step), progress=0.05))  # points without fits
    assert len(dynamic.state_dict()["points"]["rows"]) <= 64
