"""The divergence in chunks against the plain one, and its gradient against autograd's."""

import pytest
import torch
from torch import Tensor

from lightprune.distillation import kl as module
from lightprune.distillation.kl import Likeliest, divergence

TOKENS, VOCABULARY = 13, 29


@pytest.fixture(params=[1, 7 * VOCABULARY, 2**25], ids=["one token", "several chunks", "one chunk"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", request.param)


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(TOKENS, VOCABULARY, generator=generator)).requires_grad_()
    weights = torch.rand(TOKENS, generator=generator)
    weights[4] = 0
    return student, 3 * torch.randn(TOKENS, VOCABULARY, generator=generator), weights


def plain(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    p, q = (teacher.double() / temperature).softmax(-1), (student.double() / temperature).log_softmax(-1)
    each = torch.nn.functional.kl_div(q, p, reduction="none").sum(-1)
    return temperature**2 * (weights.double() * each).sum()


def plain_of_top_k(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float, k: int) -> Tensor:
    """Token by token: k events, and the sum of the others."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, w in zip(student.double(), teacher.double(), weights.double(), strict=True):
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        top = p.topk(k).indices
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[top] = False
        events_p = torch.cat([p[top], p[rest].sum(0, keepdim=True)])
        events_q = torch.cat([q[top], q[rest].sum(0, keepdim=True)])
        total = total + temperature**2 * w * (events_p * (events_p / events_q).log()).sum()
    return total


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 5, VOCABULARY - 1])
def test_value_and_gradient_are_those_of_the_plain_formula(temperature: float, k: int | None) -> None:
    student, teacher, weights = example()
    found = divergence(student, lambda chunk: teacher[chunk], weights, temperature=temperature, top_k=k)
    (gradient,) = torch.autograd.grad(3 * found, student)
    if k is None:
        expected = plain(student, teacher, weights, temperature)
    else:
        expected = plain_of_top_k(student, teacher, weights, temperature, k)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_all_of_the_vocabulary_is_a_top_k_too() -> None:
    student, teacher, weights = example()
    whole = divergence(student, lambda chunk: teacher[chunk], weights)
    torch.testing.assert_close(divergence(student, lambda c: teacher[c], weights, top_k=VOCABULARY), whole)


def test_what_was_kept_of_a_teacher_teaches_the_same() -> None:
    student, teacher, weights = example()
    log_p, tokens = (teacher / 2).log_softmax(-1).topk(5)
    kept = divergence(student, lambda c: Likeliest(tokens[c], log_p[c]), weights, temperature=2)
    torch.testing.assert_close(kept, divergence(student, lambda c: teacher[c], weights, temperature=2, top_k=5))


def test_a_student_that_says_the_same_is_at_zero() -> None:
    student, _, weights = example()
    teacher = student.detach() + 7  # logits know no zero
    found = divergence(student, lambda chunk: teacher[chunk], weights)
    (gradient,) = torch.autograd.grad(found, student)
    assert abs(float(found.detach())) < 1e-5
    assert float(gradient.abs().max()) < 1e-6


def test_certainty_breaks_nothing() -> None:
    """A teacher that is certain, and a student that is certain of something else."""
    teacher, student = torch.full((2, 8), -1e4), torch.zeros(2, 8)
    teacher[:, 3] = 1e4
    student[0, 5] = 80.0
    student.requires_grad_()
    for k in (None, 2):
        found = divergence(student, lambda chunk: teacher[chunk], torch.ones(2), top_k=k)
        (gradient,) = torch.autograd.grad(found, student)
        assert found.isfinite()
        assert gradient.isfinite().all()
        torch.testing.assert_close(float(found.detach()), 80.0 + float(torch.tensor(8.0).log()), rtol=1e-4, atol=0)


def test_in_half_precision_the_gradient_has_the_dtype_of_the_logits() -> None:
    student, teacher, weights = example()
    half = student.detach().bfloat16().requires_grad_()
    found = divergence(half, lambda chunk: teacher[chunk], weights)
    (gradient,) = torch.autograd.grad(found, half)
    assert gradient.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(half.float(), teacher, weights, 1.0), rtol=1e-4, atol=1e-4)
