"""Training's randomness depends on a seed and a batch's number, and on nothing else."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightprune.callbacks.random_state import RandomState
from lightprune.errors import ConfigError
from lightprune.integrations.seeding import seed_generators
from tests.training import Plain, Spy, batches, fit


def draw(*_: Any) -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def drawn_in_training(seed: int | None, **kwargs: Any) -> list[tuple[float, float, float]]:
    spy = Spy(draw, "on_before_zero_grad")
    fit(Plain(), [spy, RandomState(seed)], batches(4), max_steps=4, **kwargs)
    return spy.seen


def test_every_batch_draws_something_else_and_every_run_the_same() -> None:
    first = drawn_in_training(3)
    torch.rand(5)
    assert drawn_in_training(3) == first
    assert len({number for numbers in first for number in numbers}) == 12
    assert not set(first) & set(drawn_in_training(4))


def test_validation_in_between_changes_nothing() -> None:
    assert drawn_in_training(3, val_check_interval=1) == drawn_in_training(3, limit_val_batches=0)


def test_the_seed_is_that_of_the_run_and_travels_with_the_checkpoint() -> None:
    torch.manual_seed(11)
    by_default = drawn_in_training(None)
    assert by_default == drawn_in_training(11)
    resumed = RandomState(5)
    resumed.load_state_dict(RandomState(11).state_dict())
    spy = Spy(draw, "on_before_zero_grad")
    fit(Plain(), [spy, resumed], batches(4), max_steps=4)
    assert spy.seen == by_default


def test_refuses_a_seed_that_no_generator_takes() -> None:
    spy = Spy(draw, "on_train_start")
    with pytest.raises(ConfigError, match=r"RandomState\.seed is -1: it must be at least 0, or null"):
        fit(Plain(), [spy, RandomState(-1)], batches(1), max_steps=1)
    assert spy.seen == []


def test_ranks_draw_differently() -> None:
    seed_generators(1, 0, 5)
    first = draw()
    seed_generators(1, 1, 5)
    assert not set(first) & set(draw())
