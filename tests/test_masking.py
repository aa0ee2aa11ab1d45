"""Masks on a whole model: at 1 they change nothing, at 0 they compute what the cut model will, between them alpha."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.masks.unit_masks import UnitMasks, masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, NUM_LAYERS, combinations_of, left_padded, random_plan, tiny_lm, tokens
from tests.logits import assert_same, cached_logits, logits_of
from tests.surgery import by_hand
from tests.training import assert_equal, gradients

family = pytest.mark.parametrize("name", FAMILIES)
WIDTH = ("heads", "kv_groups", "channels", "hidden")


def width_plan(lm: PreTrainedModel, seed: int = 0) -> PruningPlan:
    """A plan that takes away as much as the class allows, but no layers."""
    combinations = [structures for structures in combinations_of(lm) if "layers" not in structures]
    return random_plan(anatomy_of(lm), combinations[-1], random.Random(seed))


def hooks(lm: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in lm.modules())


def loss_of(lm: PreTrainedModel) -> Tensor:
    """Of a batch without padding: what padding sees depends on how it is masked."""
    return lm(input_ids=tokens(), labels=tokens(), use_cache=False).loss


@family
def test_at_one_nothing_changes(name: str) -> None:
    lm = tiny_lm(name)
    plan = width_plan(lm)
    loss = loss_of(lm)
    loss.backward()
    plain = gradients(lm)
    lm.zero_grad()
    masks = UnitMasks(anatomy_of(lm), plan)
    assert hooks(lm) > 0
    assert set(masks.alpha.tolist()) == {1.0} == {masks.alpha_hidden.item()}
    masked_loss = loss_of(lm)
    masked_loss.backward()
    assert torch.equal(masked_loss, loss)
    assert_equal(gradients(lm), plain)
    masks.remove()
    assert hooks(lm) == 0


@family
def test_at_zero_gradients_are_those_of_the_cut_model(name: str) -> None:
    """What stays is trained as if the rest were gone already, and what goes is trained no more."""
    lm = tiny_lm(name)
    plan = width_plan(lm)
    smaller = copy.deepcopy(lm)
    cut_model(anatomy_of(smaller), plan)
    loss_of(smaller).backward()
    with masked(anatomy_of(lm), plan):
        loss_of(lm).backward()
    expected, largest = gradients(smaller), 0.0
    assert gradients(lm).keys() == expected.keys()
    for key, gradient in gradients(lm).items():
        kept = torch.from_numpy(by_hand.sliced(key, gradient.numpy(), plan))
        torch.testing.assert_close(kept, expected[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        largest = max(largest, gradient.abs().max().item())
        # All that a parameter of the layers learns, it learns where it stays.
        if by_hand.layer_of(key) is not None:
            torch.testing.assert_close(gradient.square().sum(), kept.square().sum(), rtol=1e-4, atol=1e-8)
    assert largest > 1e-3


@family
def test_masked_layers_and_units_with_a_cache(name: str) -> None:
    """Layer 0 among them: the cache counts its tokens there."""
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    plan = width_plan(lm).merged(PruningPlan.dropping(anatomy, [0, 3]))
    smaller = copy.deepcopy(lm)
    cut_model(anatomy_of(smaller), plan)
    with masked(anatomy, plan):
        assert_same(cached_logits(lm, left_padded()), logits_of(lm, left_padded()), 5e-5)
        assert_same(cached_logits(lm, left_padded()), logits_of(smaller, left_padded()), 5e-5)
    assert hooks(lm) == 0


def test_the_context_leaves_no_trace_of_an_error() -> None:
    lm = tiny_lm()
    plan = width_plan(lm).merged(PruningPlan.dropping(anatomy_of(lm), [1]))
    with pytest.raises(KeyError), masked(anatomy_of(lm), plan):
        raise KeyError
    assert hooks(lm) == 0


def test_a_plan_that_removes_no_units_masks_none() -> None:
    lm = tiny_lm()
    everything = PruningPlan.keeping(
        anatomy_of(lm),
        heads=[range(4)] * NUM_LAYERS,
        channels=[range(48)] * NUM_LAYERS,
        hidden=range(32),
    )
    for plan in (everything, PruningPlan.dropping(anatomy_of(lm), [1])):
        UnitMasks(anatomy_of(lm), plan)
        assert hooks(lm) == 0


@torch.no_grad()
def scale(linear: nn.Linear, factors: Tensor, dimension: int) -> None:
    """Multiply the outputs (0, the bias included) or the inputs (1) of a projection."""
    if dimension == 0:
        linear.weight *= factors.unsqueeze(1)
        if linear.bias is not None:
            linear.bias *= factors
    else:
        linear.weight *= factors


def factors_of(count: int, removed: list[int], alpha: float) -> Tensor:
    factors = torch.ones(count)
    for index in removed:
        factors[index] = alpha
    return factors


def test_between_heads_and_channels_count_alpha() -> None:
    """The same as output projections that read that much of them, in each layer by the layer's own alpha."""
    lm = tiny_lm("llama_tied")
    plan = random_plan(anatomy_of(lm), ("heads", "kv_groups", "channels"), random.Random(2))
    alpha = [0.9, 0.0, 0.5, 1.0, 0.25, 0.7]
    scaled = copy.deepcopy(lm)
    assert plan.kept_heads is not None
    assert plan.kept_channels is not None
    for layer, a, heads, channels in zip(scaled.model.layers, alpha, plan.kept_heads, plan.kept_channels, strict=True):
        of_heads = factors_of(4, [h for h in range(4) if h not in heads], a)
        scale(layer.self_attn.o_proj, torch.stack([f for f in of_heads for _ in range(8)]), 1)
        scale(layer.mlp.down_proj, factors_of(48, [c for c in range(48) if c not in channels], a), 1)
    masks = UnitMasks(anatomy_of(lm), plan)
    masks.alpha.copy_(torch.tensor(alpha))
    assert_same(logits_of(lm, left_padded()), logits_of(scaled, left_padded()))


class BlendedNorm(nn.Module):
    """alpha times a norm over everything, plus (1 - alpha) times one over what is kept; each written out."""

    def __init__(self, norm: Any, kept: list[int], alpha: float) -> None:
        super().__init__()
        self.norm, self.kept, self.alpha = norm, kept, alpha

    def normed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return weight * x / (x.square().mean(-1, keepdim=True) + self.norm.variance_epsilon).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        return weight * centred / (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt() + bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight, getattr(self.norm, "bias", None)
        y = self.alpha * self.normed(x, weight, bias)
        kept = self.normed(x[..., self.kept], weight[self.kept], None if bias is None else bias[self.kept])
        for column, index in enumerate(self.kept):
            y[..., index] += (1 - self.alpha) * kept[..., column]
        return y


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_between_hidden_dimensions_count_alpha(name: str, alpha: float) -> None:
    """All that writes to a dimension writes that much; norms are blended as the formula says, LayerNorm's bias too."""
    lm = tiny_lm(name)
    plan = random_plan(anatomy_of(lm), ("hidden",), random.Random(3))
    kept = list(plan.kept_hidden or ())
    factors = factors_of(32, [d for d in range(32) if d not in kept], alpha)
    by_formula = copy.deepcopy(lm)
    with torch.no_grad():
        by_formula.model.embed_tokens.weight *= factors
    final = "norm" if name == "llama" else "final_layernorm"
    setattr(by_formula.model, final, BlendedNorm(getattr(by_formula.model, final), kept, alpha))
    for layer in by_formula.model.layers:
        scale(layer.self_attn.o_proj if name == "llama" else layer.self_attn.dense, factors, 0)
        scale(layer.mlp.down_proj if name == "llama" else layer.mlp.fc2, factors, 0)
        layer.input_layernorm = BlendedNorm(layer.input_layernorm, kept, alpha)
        if name == "llama":
            layer.post_attention_layernorm = BlendedNorm(layer.post_attention_layernorm, kept, alpha)
    masks = UnitMasks(anatomy_of(lm), plan)
    masks.alpha_hidden.fill_(alpha)
    assert_same(logits_of(lm, left_padded()), logits_of(by_formula, left_padded()))


@pytest.mark.parametrize("name", ["olmo2", "gpt2", "opt", "gemma2"])
def test_masks_keep_the_precision_of_the_model(name: str) -> None:
    whole, half = tiny_lm(name), tiny_lm(name).bfloat16()
    for lm in (whole, half):
        masks = UnitMasks(anatomy_of(lm), width_plan(lm))
        masks.alpha.fill_(0.5)
        masks.alpha_hidden.fill_(0.5)
    expected = logits_of(whole, left_padded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits_of(whole, left_padded())
    assert mixed.dtype == logits_of(half, left_padded()).dtype == torch.bfloat16
    for logits in (mixed, logits_of(half, left_padded())):
        assert_same(logits.float(), expected, 0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_masked_the_same_both_times(reentrant: bool) -> None:
    lm = tiny_lm()
    plan = width_plan(lm)
    masks = UnitMasks(anatomy_of(lm), plan)
    masks.alpha.fill_(0.4)
    masks.alpha_hidden.fill_(0.4)
    loss_of(lm).backward()
    expected = gradients(lm)
    lm.zero_grad()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(lm).backward()
    for key, gradient in gradients(lm).items():
        torch.testing.assert_close(gradient, expected[key])
