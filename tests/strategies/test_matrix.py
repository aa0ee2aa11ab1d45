"""Two processes with half of each batch train, cut and go on as one does that has the whole, under each strategy."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies.conftest import Pair
from tests.strategies.runs import CASES, CUT, MOMENTS, RUNS, SELECT, STEPS, STRATEGIES

TOLERANCE = 1e-5
IN_FLOAT32 = [name for name, case in CASES.items() if not case.steps and case.precision is None]


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], *, scale: float) -> None:
    """Up to `TOLERANCE`, of numbers that are about as large as `scale`."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=TOLERANCE * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def largest(tensors: dict[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (strategy, name)
        for strategy, name in RUNS
        # To ZeRO a missing gradient is zero, and layers that are left out for a while drift by their momentum.
        if name in IN_FLOAT32 and (name != "gates beside weights" or strategy == "ddp")
    ],
)
def test_two_processes_are_one(strategy: str, name: str, pair: Pair, alone: Any) -> None:
    ends, expected = pair.ends(strategy, name), alone(name)
    for key in ("weights", *MOMENTS):
        assert all(torch.equal(ends[0][key][n], ends[1][key][n]) for n in ends[0][key]), f"{key} differ between ranks"
    actual = ends[0]
    assert actual["step"] == STEPS
    assert actual["plan"] == expected["plan"]
    assert actual["plan"] != {}
    assert actual["rates"] == expected["rates"]
    assert actual["domains"] == pytest.approx(expected["domains"], abs=TOLERANCE)
    assert bool(actual["domains"]) == CASES[name].text
    assert actual["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert len(actual["losses"]) == STEPS * CASES[name].accumulate
    assert_near(actual["weights"], expected["weights"], scale=1)
    for key in MOMENTS:
        assert_near(actual[key], expected[key], scale=largest(expected[key]))
    unmoved = [n for n, weight in actual["weights"].items() if torch.equal(weight, actual["after cut"][n])]
    assert unmoved == []


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp"])
def test_zero_stages_are_one_in_bfloat16(strategy: str, pair: Pair) -> None:
    (end, other), (expected, _) = pair.ends(strategy, "bf16"), pair.ends("zero1", "bf16")
    for key in ("weights", *MOMENTS):
        assert all(torch.equal(end[key][n], other[key][n]) for n in end[key])
        if strategy == "zero2":
            assert all(torch.equal(end[key][n], expected[key][n]) for n in end[key])
    # Stage 3 rounds gradients otherwise, long before the cut.
    assert end["losses"][: SELECT + 1] == expected["losses"][: SELECT + 1]
    assert end["losses"] == pytest.approx(expected["losses"], abs=2e-2)
    # What was carried through the cut is in full precision.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in end["weights"].values())


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp"])
def test_the_loss_scale_of_float16_goes_through_the_cut(strategy: str, pair: Pair) -> None:
    (end, other), (expected, _) = pair.ends(strategy, "fp16"), pair.ends("zero1", "fp16")
    assert end["step"] == STEPS
    for key in ("weights", *MOMENTS):
        assert all(torch.equal(end[key][n], other[key][n]) for n in end[key])
    assert end["losses"] == pytest.approx(expected["losses"], abs=2e-3)
    assert end["scales"] == expected["scales"]
    # An overflow before the cut has halved it, and a new engine would begin at 2**16 again.
    assert end["scales"][CUT - 1 : CUT + 1] == [2.0**15] * 2
