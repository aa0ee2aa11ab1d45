"""Scores of units: sums over batches against formulas on all tokens at once."""

import json

import pytest
import torch
from torch import Tensor

from lightprune.anatomy import Shape
from lightprune.importance.ranking import (
    activation_scores,
    add_moments,
    highest,
    highest_heads,
    of_groups,
    rounded,
    spread,
)


def summed(batches: list[Tensor], weights: list[Tensor]) -> Tensor:
    sums = torch.zeros(3, batches[0].shape[-1], dtype=torch.float64)
    for values, of_tokens in zip(batches, weights, strict=True):
        add_moments(sums, values, of_tokens)
    return sums


def test_moments_are_those_of_the_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 5, generator=generator) for n in (7, 3, 4)]
    weights = [torch.ones(7), torch.tensor([0.0, 1.0, 1.0]), torch.zeros(4)]
    kept = torch.cat([batches[0], batches[1][1:]]).double()
    expected = torch.stack([torch.full((5,), 9.0).double(), kept.sum(0), kept.square().sum(0)])
    torch.testing.assert_close(summed(batches, weights), expected, rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_drown_the_fluctuation() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(1000 + 0.05 * torch.randn(200, 4, generator=generator)) for _ in range(3)]
    sums = summed(batches, [torch.ones(200)] * 3)
    expected = torch.cat(batches).double().var(0, correction=0)
    scores = activation_scores(sums.unsqueeze(1), "fluctuation", 1, None)
    torch.testing.assert_close(scores[0], expected, rtol=1e-3, atol=0)


def test_highest_keeps_the_earlier_of_equals_and_ascends() -> None:
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3) == [1, 2, 3]
    assert highest(torch.zeros(6), 2) == [0, 1]


def test_heads_are_chosen_inside_of_the_groups_that_stay() -> None:
    heads = torch.tensor([9.0, 0.0, 0.0, 4.0, 5.0, 3.0, 1.0, 1.0, 2.0])
    assert of_groups(heads, 3).tolist() == [9.0, 12.0, 4.0]
    target = Shape(layers=1, hidden=8, heads=4, kv_groups=2, head_dim=4, channels=8)
    assert highest_heads(heads, of_groups(heads, 3), target) == [0, 1, 3, 4]
    assert highest_heads(heads, torch.tensor([1.0, 0.0, 2.0]), target) == [0, 1, 6, 8]


def test_rounding_leaves_four_digits() -> None:
    scores = torch.tensor([[1 / 3, 12345.678], [1.23456e-9, 0.0]], dtype=torch.float64)
    assert rounded(scores) == [[0.3333, 12350.0], [1.235e-9, 0.0]]
    assert json.loads(json.dumps(rounded(scores))) == rounded(scores)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 6.0]) == {"min": 1.0, "mean": pytest.approx(3.0), "max": 6.0}
