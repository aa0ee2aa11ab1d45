"""Hard-concrete mathematics against Monte Carlo and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from lightprune.masks.hard_concrete import (
    INITIAL,
    LIMIT,
    deterministic,
    lagrangian,
    probability_open,
    quantile,
    sample,
)

DRAWS = 400_000
LOGITS = (-LIMIT, -1.5, 0.0, 0.7, 3.0, INITIAL)
logit = pytest.mark.parametrize("value", LOGITS)


def draws(value: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(1000 * value) % 2**31)
    noise = torch.rand(DRAWS, generator=generator).clamp(1e-6, 1 - 1e-6)
    return sample(torch.full((DRAWS,), value), noise)


def cdf(x: Tensor, logits: Tensor) -> Tensor:
    """P(stretched variable <= x), for x in (-0.1, 1.1), before it is clipped: P(z <= x) for x in [0, 1).

    Louizos et al., equations 24 and 25, by their constants.
    """
    return torch.sigmoid(2 / 3 * torch.logit((x + 0.1) / 1.2) - logits)


@logit
def test_draws_follow_the_distribution(value: float) -> None:
    z, at = draws(value), torch.tensor(value, dtype=torch.float64)
    assert z.min() >= 0
    assert z.max() <= 1
    error = 5 * 0.5 / math.sqrt(DRAWS)
    assert (z > 0).double().mean() == pytest.approx(probability_open(at).item(), abs=error)
    for x in (0.0, 0.1, 0.5, 0.9, 0.999):
        expected = cdf(torch.tensor(x, dtype=torch.float64), at).item()
        assert (z <= x).double().mean().item() == pytest.approx(expected, abs=error)
    assert probability_open(at) == pytest.approx(1 - cdf(torch.tensor(0.0, dtype=torch.float64), at).item())


@logit
def test_quantiles_of_draws_and_of_the_cdf(value: float) -> None:
    p = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    at = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(cdf(quantile(p, at), at), p)
    empirical = torch.quantile(draws(value)[:100_000].double(), p)
    spread = quantile((p + 0.01).clamp(max=0.999), at) - quantile((p - 0.01).clamp(min=0.001), at)
    assert ((empirical - quantile(p, at).clamp(0, 1)).abs() <= spread + 1e-9).all()


def test_expected_sparsity_and_its_slope() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    closed = torch.stack([(draws(value) == 0).double().mean() for value in LOGITS])
    sparsity = 1 - probability_open(logits)
    torch.testing.assert_close(sparsity.detach(), closed, rtol=0, atol=4e-3)
    sparsity.sum().backward()
    torch.testing.assert_close(logits.grad, -(sparsity * (1 - sparsity)).detach())


def test_evaluation_keeps_the_highest_and_of_equal_ones_the_earlier() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, -2.0], [0.5, 0.5, 0.5, 0.5]])
    by_hand = 1 / (1 + math.exp(-1.0 * 1.5 * 0.8))
    z = deterministic(logits, 2)
    assert z[0].tolist() == pytest.approx([by_hand, 1 / (1 + math.exp(-3.6)), 0, 0])
    assert (z[1] > 0).tolist() == [True, True, False, False]
    assert (deterministic(logits, 4) > 0).all()


def test_lagrangian_by_hand() -> None:
    sparsity = torch.tensor([0.2, 0.5, 0.6], requires_grad=True)
    multipliers = torch.tensor([2.0, -3.0], requires_grad=True)
    value = lagrangian(sparsity, 0.3, *multipliers)
    rows = [2.0 * (s - 0.3) - 3.0 * (s - 0.3) ** 2 for s in (0.2, 0.5, 0.6)]
    assert value.item() == pytest.approx(sum(rows) / 3)
    value.backward()
    assert multipliers.grad is not None
    # Uphill, the first multiplier follows the excess, the second its square.
    assert multipliers.grad.tolist() == pytest.approx([(-0.1 + 0.2 + 0.3) / 3, (0.01 + 0.04 + 0.09) / 3])
