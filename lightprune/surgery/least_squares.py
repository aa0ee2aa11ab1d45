"""Closed-form refits: the change of a projection's weights that makes up best for what its output lacks.

Shapes: N tokens, k inputs of a projection, n outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightprune.integrations.exact_metric import widest


@dataclass
class NormalEquations:
    """What a ridge regression of errors E [N, n] on inputs X [N, k] needs of its tokens: sums, whatever N is.

    Attributes:
        xx: X^T X, [k, k].
        xe: X^T E, [k, n].
        ee: the sum of squares of E, [].
        tokens: N, [].
    """

    xx: Tensor
    xe: Tensor
    ee: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        """The sums over no token, in the widest floating-point type that the device has."""
        zeros = partial(torch.zeros, dtype=widest(device), device=device)
        return cls(zeros(inputs, inputs), zeros(inputs, outputs), zeros(()), zeros(()))

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Count tokens in: `inputs` [N, k] and `errors` [N, n], float32. Products are float32, sums wider."""
        self.xx += inputs.T @ inputs
        self.xe += inputs.T @ errors
        self.ee += errors.square().sum(dtype=self.ee.dtype)
        self.tokens += len(inputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, in the order of the attributes."""
        return self.xx, self.xe, self.ee, self.tokens

    def solve(self, strength: float) -> Tensor:
        """The change B [k, n] that minimizes ||E - X B||^2 + lambda ||B||^2.

        The penalty is on the change, so it pulls towards the weights that are there. lambda = strength x the mean of
        the diagonal of X^T X, so that a strength means the same for all layers and numbers of tokens.
        """
        diagonal = self.xx.diagonal()
        ridge = strength * diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(self.xx + torch.diag(ridge.expand_as(diagonal)))
        if failed:  # not positive definite in this precision: inputs that depend on each other, and hardly a penalty
            solution: Tensor = torch.linalg.lstsq(self.xx + torch.diag(ridge.expand_as(diagonal)), self.xe).solution
            return solution
        return torch.cholesky_solve(self.xe, factor)

    def error(self, change: Tensor) -> Tensor:
        """||E - X B||^2 / N, [], of a change B [k, n] on these tokens."""
        squares = self.ee - 2 * (change * self.xe).sum() + (change * (self.xx @ change)).sum()
        return squares.clamp(min=0) / self.tokens.clamp(min=1)


@dataclass
class ScaleEquations:
    """The same where every output has a weight of its own, as behind a norm: E_j is regressed on X_j alone; n = k.

    Attributes:
        xx: the sums of X_j^2, [n].
        xe: the sums of X_j E_j, [n].
        ee: the sum of squares of E, [].
        tokens: N, [].
    """

    xx: Tensor
    xe: Tensor
    ee: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, outputs: int, device: torch.device) -> "ScaleEquations":
        """The sums over no token."""
        zeros = partial(torch.zeros, dtype=widest(device), device=device)
        return cls(zeros(outputs), zeros(outputs), zeros(()), zeros(()))

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Count tokens in: `inputs` and `errors`, both [N, n]."""
        self.xx += inputs.square().sum(0, dtype=self.xx.dtype)
        self.xe += (inputs * errors).sum(0, dtype=self.xe.dtype)
        self.ee += errors.square().sum(dtype=self.ee.dtype)
        self.tokens += len(inputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, in the order of the attributes."""
        return self.xx, self.xe, self.ee, self.tokens

    def solve(self, strength: float) -> Tensor:
        """The changes b [n] that minimize, each for itself, ||E_j - X_j b_j||^2 + lambda b_j^2."""
        ridge = strength * self.xx.mean().clamp(min=torch.finfo(self.xx.dtype).tiny)
        return self.xe / (self.xx + ridge)

    def error(self, change: Tensor) -> Tensor:
        """||E - X diag(b)||^2 / N, []."""
        squares = self.ee - 2 * (change * self.xe).sum() + (change.square() * self.xx).sum()
        return squares.clamp(min=0) / self.tokens.clamp(min=1)


Equations = NormalEquations | ScaleEquations


@dataclass(frozen=True)
class Refit:
    """What a regression found, and how it does on tokens that it has not seen.

    Attributes:
        change: what to add to the weights, transposed: [k, n], or [n] for scales.
        strength: the ridge that does best on the held-out tokens.
        before: the mean squared error of the held-out tokens without the change, summed over the outputs.
        after: the same with it.
    """

    change: Tensor
    strength: float
    before: float
    after: float


def best_refit(fit: Equations, held_out: Equations, strengths: Sequence[float]) -> Refit | None:
    """The refit whose ridge, one of `strengths`, leaves the least error on the held-out tokens.

    None where no ridge makes that error smaller than it is without any change: then the weights are best left alone.
    The error falls up to the best strength and rises from there, so the search begins in the middle of `strengths`,
    which ascend, and goes on while it gets better: each solution of a large system is worth saving.
    """
    before = float(held_out.error(torch.zeros_like(held_out.xe)))
    middle = len(strengths) // 2
    best = _tried(fit, held_out, strengths[middle], before)
    for direction in (strengths[middle + 1 :], strengths[:middle][::-1]):
        better = False
        for strength in direction:
            other = _tried(fit, held_out, strength, before)
            if not other.after < best.after:  # or it is no number
                break
            best, better = other, True
        if better:
            break
    return best if best.after < before else None


def _tried(fit: Equations, held_out: Equations, strength: float, before: float) -> Refit:
    change = fit.solve(strength)
    return Refit(change, strength, before, float(held_out.error(change)))
