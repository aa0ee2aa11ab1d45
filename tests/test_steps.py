"""Steps as shares of the run: changing `max_steps` alone is enough."""

from collections.abc import Callable

import pytest

import lightprune as lp
from lightprune.errors import ConfigError
from lightprune.pipeline import Part
from lightprune.pipeline.steps import share_in_steps
from tests.training import Plain, batches, fit


@pytest.mark.parametrize(
    ("share", "max_steps", "steps"),
    [("75%", 128, 96), ("0%", 128, 0), ("100%", 7, 7), (" 12.5 % ", 10, 1), ("0.1%", 10, 1), ("30%", 256, 77)],
)
def test_a_share_is_rounded_and_never_vanishes(share: str, max_steps: int, steps: int) -> None:
    assert share_in_steps(None, "at", share, max_steps) == steps


@pytest.mark.parametrize("share", ["101%", "-5%", "lots", "75", "%", "5%%", "1e2%"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match=r"at is .* a share of the run from 0% to 100%, such as 75%"):
        share_in_steps(None, "at", share, 128)


def schedule() -> list[Part]:
    return [
        lp.LayerGateSelector(drop=2, stop="25%"),
        lp.GateAnnealing(stop="50%"),
        lp.StructuredCut(at="62.5%"),
        lp.Recovery(lr=1e-3, warmup_steps="25%"),
    ]


@pytest.mark.parametrize("max_steps", [8, 16])
def test_changing_max_steps_alone_moves_the_whole_schedule(max_steps: int) -> None:
    gates, annealing, cut, recovery = parts = schedule()
    fit(Plain(), parts, batches(max_steps), max_steps=max_steps)
    eighth = max_steps // 8
    assert (gates.steps_per_round, gates.stop, annealing.stop) == (eighth, 2 * eighth, 4 * eighth)
    assert (cut.at, cut.step, recovery.warmup_steps) == (5 * eighth, 5 * eighth, 2 * eighth)


def test_a_share_is_what_the_same_number_of_steps_is() -> None:
    logs = []
    for at in (6, "75%"):
        module = Plain()
        fit(module, [lp.BlockInfluenceSelector(drop=2, stop=2), lp.StructuredCut(at=at)], batches(8), max_steps=8)
        logs.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(left.equal(right) for left, right in zip(*logs, strict=True))


def test_rounds_that_do_not_divide_the_window_end_before_its_end() -> None:
    gates, cut = lp.LayerGateSelector(drop=2, stop=7), lp.StructuredCut()
    fit(Plain(), [gates, cut], batches(8), max_steps=8)
    assert (gates.steps_per_round, gates.stop, cut.step) == (3, 6, 6)


@pytest.mark.parametrize(
    ("parts", "at"),
    [
        (lambda: [lp.BlockInfluenceSelector(drop=2, stop=3)], 3),
        (lambda: [lp.BlockInfluenceSelector(drop=2, stop=3), lp.DifferencePenalty(stop="75%")], 6),
        (lambda: [lp.RandomSelector(drop=1), lp.MagnitudeUnitSelector(channels=0.5, start="25%", multiple_of=1)], 2),
    ],
)
def test_a_cut_without_a_step_comes_when_the_windows_end(parts: Callable[[], list[Part]], at: int) -> None:
    cut = lp.StructuredCut()
    fit(Plain(), [*parts(), cut], batches(8), max_steps=8)
    assert cut.step == at


@pytest.mark.parametrize(
    ("parts", "max_steps", "sentence"),
    [
        (lambda: [lp.StructuredCut(at="50%")], -1, r"StructuredCut.at is '50%', a share of trainer.max_steps.*not set"),
        (lambda: [lp.StructuredCut(at="half")], 8, r"StructuredCut.at is 'half': it must be a whole number"),
        (lambda: [lp.GateAnnealing(), lp.StructuredCut()], 8, r"at and GateAnnealing.stop are both left out"),
        (lambda: [lp.StructuredCut(), lp.StructuredCut(at=6)], 8, r"at is left out in a run with 2 cuts"),
        (
            lambda: [lp.LayerGateSelector(drop=3, start=1, stop="25%"), lp.StructuredCut()],
            8,
            r"1 steps from `start` to `stop` for 3 rounds: set `stop` to at least 4",
        ),
        (lambda: [lp.StructuredCut(at=4), lp.Recovery(lr=1e-3, warmup_steps="x")], 8, r"warmup_steps is 'x'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    parts: Callable[[], list[Part]], max_steps: int, sentence: str
) -> None:
    chosen = parts()
    if not any(isinstance(part, lp.LayerGateSelector) for part in chosen):
        chosen = [lp.RandomSelector(drop=2), *chosen]
    with pytest.raises(ConfigError, match=sentence):
        fit(Plain(), chosen, batches(4), max_steps=max_steps, max_epochs=2)


def test_a_window_is_given_once() -> None:
    with pytest.raises(ConfigError, match=r"steps_per_round is 4 and LayerGateSelector.stop is 8: give one of them"):
        lp.LayerGateSelector(drop=2, steps_per_round=4, stop=8)
