"""The learning rate after the cut, counted from it."""

import math
from typing import Any

import pytest
import torch

from lightprune import RandomSelector, Recovery, StructuredCut
from lightprune.recovery.learning_rate import rate_factor
from tests.training import Batches, Plain, Spy, batches, fit, trainer_for

CUT, STEPS = 3, 11


def rates(recovery: Recovery | None, scheduler: Any = None, groups: int = 1) -> list[list[float]]:
    """Each group's rate in each training step."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        params = list(parameters)
        split = [{"params": params[i::groups], "lr": 1e-3 / (i + 1)} for i in range(groups)]
        return torch.optim.SGD(split, lr=1e-3)

    spy = Spy(lambda trainer, _: [g["lr"] for g in trainer.optimizers[0].param_groups], "on_before_optimizer_step")
    parts = [RandomSelector(drop=2), StructuredCut(at=CUT, validate=False), *([recovery] if recovery else [])]
    fit(Plain(optimizer=optimizer, scheduler=scheduler), [spy, *parts], batches(STEPS), max_steps=STEPS)
    return spy.seen


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # 8 steps after the cut: 2 of warm-up, the second of which has the peak, then 6 towards 0.1.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, *(1 - 0.9 * k / 6 for k in range(6))]),
        ("cosine", [0.5, 1, *(0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6))]),
    ],
)
@pytest.mark.parametrize("scheduled", [True, False])
def test_rates_from_the_cut_on(decay: Any, expected: list[float], scheduled: bool) -> None:
    scheduler = (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)) if scheduled else None
    seen = rates(Recovery(lr=0.02, warmup_steps=2, decay=decay, final_ratio=0.1), scheduler)
    assert [rate for (rate,) in seen[CUT:]] == pytest.approx([0.02 * factor for factor in expected])
    assert seen[:CUT] == rates(None, scheduler)[:CUT]


def test_groups_keep_their_ratios() -> None:
    seen = rates(Recovery(lr=0.02), groups=3)
    assert seen[CUT:] == [pytest.approx([0.02, 0.01, 0.02 / 3])] * (STEPS - CUT)


def test_ratios_are_those_of_the_configuration_under_a_scheduler_that_moves_groups_apart() -> None:
    def scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.5**s])

    assert rates(Recovery(lr=0.02), scheduler, groups=2)[CUT] == pytest.approx([0.02, 0.01])


def test_without_recovery_the_users_schedule_goes_on() -> None:
    seen = rates(None, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)))
    assert [rate for (rate,) in seen] == pytest.approx([1e-3 / (1 + s) for s in range(STEPS)])


def test_the_last_step_does_not_pass_the_end() -> None:
    assert rate_factor(100, 10, 2, "linear", 0.1) == pytest.approx(0.1)
    assert rate_factor(0, 0, 0, "cosine", 0.1) == 1.0


def test_rates_of_zero_have_equal_ratios() -> None:
    def scheduler(optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 0.0
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)

    seen = rates(Recovery(lr=0.02), scheduler, groups=2)
    assert seen == [[0.0, 0.0]] * CUT + [[0.02, 0.02]] * (STEPS - CUT)


def test_ratios_survive_a_resume_from_a_rate_of_zero(tmp_path: Any) -> None:
    """At the end of a decay to 0 the optimizer's own state has nothing left to tell them by."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        params = list(parameters)
        return torch.optim.SGD([{"params": params[::2]}, {"params": params[1::2], "lr": 0.5e-3}], lr=1e-3)

    def parts() -> list[Any]:
        return [
            RandomSelector(drop=2),
            StructuredCut(at=1, validate=False),
            Recovery(lr=0.02, decay="linear", final_ratio=0.0),
        ]

    fit(Plain(optimizer=optimizer), parts(), batches(3), 3).save_checkpoint(tmp_path / "end.ckpt")
    spy = Spy(lambda trainer, _: [g["lr"] for g in trainer.optimizers[0].param_groups], "on_before_optimizer_step")
    rest = Batches(batches(5)[3:])
    trainer = trainer_for([spy, *parts()], 5)
    trainer.fit(Plain(optimizer=optimizer), rest, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    # Steps 4 and 5: 2 and 3 of 4 after the cut.
    assert spy.seen == [pytest.approx([0.01, 0.005]), pytest.approx([0.005, 0.0025])]
