"""Values on whole models: masked == folded == cut, for every family and every combination of structures."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.importance.norms import norm_over
from lightprune.masks.soft_masks import UnitValues, Values, scaled
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, Structures, combinations_of, left_padded, random_plan, tiny_lm, tokens
from tests.logits import assert_same, cached_logits, logits_of
from tests.test_masking import hooks, loss_of
from tests.training import assert_equal, gradients

family = pytest.mark.parametrize("name", FAMILIES)


def random_values(
    anatomy: Anatomy, plan: PruningPlan, structures: Structures, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Values:
    """0 for what the plan removes, and from 0.5 to 1 for what stays."""
    shape, generator = plan.source, torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return 0.5 + 0.5 * torch.rand(size, generator=generator, dtype=dtype)

    layers, heads, channels = draw(shape.layers), draw(shape.layers, shape.heads), draw(shape.layers, shape.channels)
    hidden = draw(shape.hidden)
    layers[list(plan.dropped_layers)] = 0
    hidden[plan.removed("hidden", 0)] = 0
    for layer in range(shape.layers):
        heads[layer, plan.removed("heads", layer)] = 0
        channels[layer, plan.removed("channels", layer)] = 0
    return Values(
        layers=layers if "layers" in structures else None,
        heads=heads if {"heads", "kv_groups"} & set(structures) else None,
        channels=channels if "channels" in structures else None,
        hidden=hidden if "hidden" in structures else None,
    )


@contextmanager
def all_in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RMS norms and some softmaxes of the families compute in float32, even of float64: here they do not."""
    to, softmax = Tensor.to, nn.functional.softmax

    def wide(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 and args == (torch.float32,) else to(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", wide)
        patch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
        patch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else to(self, torch.float32))
        yield


def doubled(lm: PreTrainedModel) -> PreTrainedModel:
    lm = copy.deepcopy(lm).double()
    lm.config._experts_implementation = "eager"  # the fast one knows no float64
    return lm


def check_fold(lm: PreTrainedModel, structures: Structures, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    anatomy = anatomy_of(lm)
    plan = random_plan(anatomy, structures, random.Random(seed))
    values = random_values(anatomy, plan, structures, seed, dtype)
    units = UnitValues(anatomy, values)
    expected = logits_of(lm, left_padded())
    units.fold()
    units.remove()
    assert hooks(lm) == 0
    cut_model(anatomy, plan)
    assert_same(logits_of(lm, left_padded()), expected, tolerance)


@family
def test_masked_folded_and_cut_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of structures: float64 finds what is wrong, float32 is what trains."""
    lm = tiny_lm(name, num_layers=3)
    combinations = combinations_of(lm)
    for seed, structures in enumerate(combinations):
        with all_in_double(monkeypatch):
            check_fold(doubled(lm), structures, seed, torch.float64, 1e-10)
        if structures == combinations[-1]:
            check_fold(copy.deepcopy(lm), structures, seed, torch.float32, 1e-5)


@family
def test_at_one_nothing_changes(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    loss = loss_of(lm)
    loss.backward()
    plain = gradients(lm)
    lm.zero_grad()
    structures = combinations_of(lm)[-1]
    ones = random_values(anatomy, random_plan(anatomy, structures, random.Random(0)), structures)
    leaves = Values(*(None if v is None else torch.ones_like(v) for v in vars(ones).values())).leaves()
    units = UnitValues(anatomy, leaves)
    assert hooks(lm) > 0
    masked_loss = loss_of(lm)
    masked_loss.backward()
    assert torch.equal(masked_loss, loss)
    assert_equal(gradients(lm), plain)
    for leaf, _ in leaves.pairs(leaves):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0
    units.remove()
    assert hooks(lm) == 0


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "olmo2", "gpt2", "opt_projected", "qwen3_moe", "phi"])
def test_gradients_of_values_are_slopes_of_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, with some units closed; closed ones have none."""
    lm = doubled(tiny_lm(name, num_layers=2))
    anatomy = anatomy_of(lm)
    structures = tuple(s for s in combinations_of(lm)[-1] if s != "layers")
    plan = random_plan(anatomy, structures, random.Random(1))
    leaves = random_values(anatomy, plan, (*structures, "layers"), dtype=torch.float64).leaves()
    with all_in_double(monkeypatch):
        units = UnitValues(anatomy, leaves)
        loss_of(lm).backward()
        generator = torch.Generator().manual_seed(5)
        for leaf, _ in leaves.pairs(leaves):
            assert leaf.grad is not None
            assert not leaf.grad[leaf == 0].any()
            direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) * (leaf > 0)
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf += sign * 1e-6 * direction
                    units.set(leaves)
                    losses.append(loss_of(lm))
                    leaf -= sign * 1e-6 * direction
            slope = (losses[0] - losses[1]) / 2e-6
            torch.testing.assert_close((leaf.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "opt_plain_norms", "mixtral"])
def test_closed_layers_with_a_cache(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    structures = combinations_of(lm)[-1]
    plan = random_plan(anatomy, tuple(s for s in structures if s != "layers"), random.Random(2))
    plan = plan.merged(PruningPlan.dropping(anatomy, [0, 3]))
    UnitValues(anatomy, random_values(anatomy, plan, structures))
    assert_same(cached_logits(lm, left_padded()), logits_of(lm, left_padded()), 5e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant: bool) -> None:
    lm = tiny_lm()
    anatomy = anatomy_of(lm)
    structures = ("layers", "heads", "kv_groups", "channels", "hidden")
    leaves = random_values(anatomy, random_plan(anatomy, structures, random.Random(3)), structures).leaves()
    UnitValues(anatomy, leaves)

    def step() -> dict[str, Tensor]:
        lm.zero_grad()
        loss_of(lm).backward()
        found = gradients(lm)
        for index, (leaf, _) in enumerate(leaves.pairs(leaves)):
            assert leaf.grad is not None
            found[f"values {index}"], leaf.grad = leaf.grad, None
        return found

    expected = step()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, gradient in step().items():
        torch.testing.assert_close(gradient, expected[key])


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "opt_plain_norms"])
def test_norm_over_is_the_norm_of_what_is_kept(name: str) -> None:
    """Against the family's own norm on the gathered dimensions, closed ones not being 0."""
    lm = tiny_lm(name)
    norm = next(site.module for site in anatomy_of(lm).sites() if site.is_norm)
    kept = (torch.rand(32, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    rows = kept.nonzero()[:, 0]
    small = copy.deepcopy(norm)
    for key, parameter in norm.named_parameters():
        setattr(small, key, nn.Parameter(parameter.detach()[rows]))
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(rows),)
    values = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    actual = norm_over(norm, values, kept)
    torch.testing.assert_close(actual[..., rows], small(values[..., rows]))
    assert not actual[..., kept == 0].any()


def test_what_is_scaled_in_half_precision_has_precise_slopes() -> None:
    activation = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    scale = torch.linspace(0, 1, 8).requires_grad_()
    slope = torch.ones(400, 8).bfloat16()
    scaled(activation, scale).backward(slope)
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    assert activation.grad is not None
    assert activation.grad.dtype == torch.bfloat16
    expected = activation.detach().float().sum(0)
    torch.testing.assert_close(scale.grad[1:], expected[1:], rtol=0.02, atol=0.1)
    assert scale.grad[0] == 0


def test_all_heads_of_a_layer_may_be_closed() -> None:
    """A draw may close them all; the norms over them have nothing to run over then."""
    lm = tiny_lm("olmo2")
    heads = torch.ones(6, 4)
    heads[2] = 0
    UnitValues(anatomy_of(lm), Values(heads=heads))
    assert torch.isfinite(lm(input_ids=tokens()).logits).all()
