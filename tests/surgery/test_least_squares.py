"""Closed forms against `torch.linalg.lstsq` on the system that they stand for."""

import pytest
import torch
from torch import Tensor

from lightprune.surgery.least_squares import NormalEquations, ScaleEquations, best_refit

CPU = torch.device("cpu")


def problem(tokens: int = 200, inputs: int = 7, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    return x, x @ torch.randn(inputs, outputs, generator=generator) + 0.1 * torch.randn(
        tokens, outputs, generator=generator
    )


def filled(x: Tensor, e: Tensor, pieces: int = 3) -> NormalEquations:
    equations = NormalEquations.empty(x.shape[1], e.shape[1], CPU)
    for x_piece, e_piece in zip(x.chunk(pieces), e.chunk(pieces), strict=True):
        equations.add(x_piece, e_piece)
    return equations


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0])
def test_ridge_regression_is_least_squares_on_the_extended_system(strength: float) -> None:
    x, e = problem()
    found = filled(x, e).solve(strength)
    x, e = x.double(), e.double()
    ridge = strength * (x.T @ x).diagonal().mean()
    extended = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(extended, torch.cat([e, torch.zeros(x.shape[1], e.shape[1]).double()])).solution
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_error_is_that_of_the_tokens_themselves() -> None:
    x, e = problem()
    change = torch.randn(x.shape[1], e.shape[1], dtype=torch.float64)
    expected = (e.double() - x.double() @ change).square().sum() / len(x)
    torch.testing.assert_close(filled(x, e).error(change), expected, rtol=1e-5, atol=0)


def test_inputs_that_depend_on_each_other() -> None:
    x, e = problem()
    x = torch.cat([x, x[:, :2]], dim=1)
    found = filled(x, e).solve(0.0)
    assert found.isfinite().all()
    residual = (e.double() - x.double() @ found).square().sum()
    expected = torch.linalg.lstsq(x[:, :7].double(), e.double()).solution
    best = (e.double() - x[:, :7].double() @ expected).square().sum()
    torch.testing.assert_close(residual, best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0])
def test_scales_are_regressions_of_their_own(strength: float) -> None:
    x, _ = problem(outputs=7)
    e = x * torch.linspace(-1, 1, 7) + 0.1 * torch.randn(x.shape)
    equations = ScaleEquations.empty(7, CPU)
    for x_piece, e_piece in zip(x.chunk(4), e.chunk(4), strict=True):
        equations.add(x_piece, e_piece)
    found = equations.solve(strength)
    ridge = strength * x.double().square().sum(0).mean()
    for column in range(7):
        extended = torch.cat([x[:, column].double(), ridge.sqrt()[None]])[:, None]
        target = torch.cat([e[:, column].double(), torch.zeros(1).double()])[:, None]
        expected = torch.linalg.lstsq(extended, target).solution[0, 0]
        torch.testing.assert_close(found[column], expected, rtol=1e-5, atol=1e-7)
    expected_error = (e.double() - x.double() * found).square().sum() / len(x)
    torch.testing.assert_close(equations.error(found), expected_error, rtol=1e-5, atol=1e-9)


def test_the_ridge_is_the_one_that_does_best_on_held_out_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.3 * torch.randn(10, 5, generator=generator)
    x, held_x = torch.randn(14, 10, generator=generator), torch.randn(400, 10, generator=generator)
    e = x @ weights + torch.randn(14, 5, generator=generator)  # few tokens and much noise: without a ridge it overfits
    fit, held_out = filled(x, e), filled(held_x, held_x @ weights)
    strengths = (1e-6, 1e-2, 0.1, 1.0, 10.0)
    errors = {strength: float(held_out.error(fit.solve(strength))) for strength in strengths}
    found = best_refit(fit, held_out, strengths)
    assert found is not None
    assert found.strength == min(errors, key=errors.__getitem__) != 1e-6
    assert found.after == min(errors.values()) < found.before


def test_what_does_not_help_is_left_alone() -> None:
    x, _ = problem()
    held_x, _ = problem(seed=1)
    nothing = torch.zeros(len(x), 5)
    assert best_refit(filled(x, nothing), filled(held_x, nothing), (0.1, 1.0)) is None
    opposite = filled(x, x[:, :5]), filled(held_x, -held_x[:, :5])
    assert best_refit(*opposite, (1e-3, 1.0)) is None
