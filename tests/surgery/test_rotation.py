"""A rotation of the residual stream: the same logits in another basis, and the basis that keeps the most."""

import copy
from contextlib import nullcontext

import pytest
import torch

from lightprune.anatomy import anatomy_of
from lightprune.compensation.principal import check_rotation, principal_basis, rotate_to_principal, second_moments
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from lightprune.surgery.rotation import final_norm, rotate
from lightprune.surgery.stock_class import is_tied
from tests.families import FAMILIES, left_padded, tiny_lm, tokens

ROTATED = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "phi3", "phi3_longrope")


def turned(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def edited(parameter):  # type: ignore[no-untyped-def]
    return nullcontext(parameter.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_or_the_family_is_refused_by_name(family: str) -> None:
    lm = tiny_lm(family).eval()
    anatomy = anatomy_of(lm)
    if family not in ROTATED:
        with pytest.raises(ConfigError, match=rf"rotate is true, and {anatomy.model_type} .*set it to false"):
            check_rotation(anatomy)
        return
    check_rotation(anatomy)
    if is_tied(lm):  # where the final norm's weights are equal, they commute with any rotation
        final_norm(anatomy).module.weight.data.fill_(1.3)
    batch = left_padded(3, 12)
    with torch.no_grad():
        before = lm(**batch).logits
        rotate(anatomy, turned(anatomy.shape.hidden), edited)
        after = lm(**batch).logits
    assert torch.allclose(before, after, atol=2e-4, rtol=1e-4), (before - after).abs().max()


def test_held_dimensions_keep_a_tied_model_as_it_was() -> None:
    lm = tiny_lm("llama_tied").eval()
    anatomy = anatomy_of(lm)
    weight = final_norm(anatomy).module.weight.data
    weight.fill_(1.5)
    weight[[3, 20]] = torch.tensor([-2.0, 4.0])
    kept = [index for index in range(32) if index % 4]
    batches = [{"input_ids": tokens(4, 12, seed)} for seed in range(4)]
    before = copy.deepcopy(lm)
    rotate_to_principal(anatomy, PruningPlan.of(anatomy, hidden=kept), batches, lambda tensor: tensor, edited)
    with torch.no_grad():
        assert torch.allclose(lm(**batches[0]).logits, before(**batches[0]).logits, atol=1e-4)
    assert not torch.equal(lm.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_the_basis_is_orthogonal_and_keeps_the_most() -> None:
    rows = torch.randn(500, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ turned(12).mul(
        torch.arange(1, 13)
    )
    kept = [1, 4, 5, 9]
    basis = principal_basis(rows.T @ rows, kept, held=[])
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)
    inside = (rows @ basis[:, kept]).square().sum()
    best = torch.linalg.svdvals(rows)[:4].square().sum()
    assert torch.allclose(inside, best)
    held = principal_basis(rows.T @ rows, kept, held=[7, 2])
    assert torch.equal(held[:, 1], torch.eye(12, dtype=torch.float64)[7])
    assert torch.equal(held[:, 4], torch.eye(12, dtype=torch.float64)[2])
    assert torch.allclose(held.T @ held, torch.eye(12, dtype=torch.float64), atol=1e-12)


def test_moments_are_those_of_unit_vectors_without_padding() -> None:
    lm = tiny_lm("llama").eval()
    anatomy = anatomy_of(lm)
    batch = left_padded(3, 12)
    with torch.no_grad():
        states = lm.model(**batch, output_hidden_states=True).hidden_states
    total = second_moments(anatomy, [batch])
    counted = int(batch["attention_mask"].sum())
    assert torch.allclose(total.trace(), torch.tensor(counted * (2 * anatomy.num_layers + 1.0)).to(total))
    first = torch.nn.functional.normalize(states[0][batch["attention_mask"].bool()], dim=-1)
    assert torch.linalg.eigvalsh(total - (first.T @ first).to(total)).min() > -1e-3


def test_a_stream_of_few_dimensions_is_cut_without_loss() -> None:
    """All that is written lies in a subspace that no dimension alone spans: cut in its basis, nothing is lost."""
    lm = tiny_lm("llama").eval()
    anatomy = anatomy_of(lm)
    size = anatomy.shape.hidden
    inside = turned(size, 1)[:, : size // 2]
    into = (inside @ inside.T).float()
    with torch.no_grad():
        for site in anatomy.sites():
            for weight in site.weights():
                if site.writes_hidden:
                    values = weight.parameter.data
                    values.copy_(values @ into if site.axes[0] is None or values.ndim == 1 else into @ values)
        for site in anatomy.sites():
            if site.is_norm:
                site.module.weight.data.fill_(1.0)
        batches = [{"input_ids": tokens(8, 12, seed)} for seed in range(4)]
        before = lm(**batches[0]).logits
        kept = list(range(0, size, 2))
        plan = PruningPlan.of(anatomy, hidden=kept)
        rotate_to_principal(anatomy, plan, batches, lambda tensor: tensor, edited)
        cut_model(anatomy, plan)
        # A norm over half of the dimensions divides by a mean square that is twice as large.
        for site in anatomy.sites():
            if site.is_norm:
                site.module.weight.data.mul_(2**0.5)
                site.module.variance_epsilon *= 2
        assert torch.allclose(lm(**batches[0]).logits, before, atol=1e-3)
