"""Invariant 2 for depth: a model with its layers left out, and the same model cut by the plan, are one function."""

import copy
import random
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.masks.gates import Bypass, attach_gate
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model, resulting_parameters
from tests.families import FAMILIES, NUM_LAYERS, TIED, combinations_of, left_padded, random_plan, tiny_lm
from tests.logits import assert_same, cached_logits, logits_of
from tests.surgery import by_hand

DROPS = ([0], [1, 3], [0, 2, 4, NUM_LAYERS - 1])
family = pytest.mark.parametrize("name", FAMILIES)
dropped = pytest.mark.parametrize("drop", DROPS, ids=str)

# Where each family keeps its layers and their index; stated here again, not read from the anatomy.
LAYERS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt2_inverse_scale": "transformer.h",
    "opt_projected": "model.decoder.layers",
    "opt_plain_norms": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox_sequential": "gpt_neox.layers",
}
ATTENTION = {
    "gpt2": "attn",
    "gpt2_inverse_scale": "attn",
    "gpt_neox": "attention",
    "gpt_neox_sequential": "attention",
}


def layers_of(lm: PreTrainedModel, name: str) -> nn.ModuleList:
    layers = attrgetter(LAYERS.get(name, "model.layers"))(lm)
    assert isinstance(layers, nn.ModuleList)
    return layers


def left_out(lm: PreTrainedModel, name: str, drop: list[int]) -> PreTrainedModel:
    """A copy of the uncut model, each of the layers in `drop` replaced by one that hands on its input."""

    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    masked = copy.deepcopy(lm)
    layers = layers_of(masked, name)
    for index in drop:
        layers[index] = Nothing()
    return masked


def cut_copy(lm: PreTrainedModel, drop: list[int]) -> PreTrainedModel:
    smaller = copy.deepcopy(lm)
    anatomy = anatomy_of(smaller)
    cut_model(anatomy, PruningPlan.dropping(anatomy, drop))
    return smaller


@family
@dropped
def test_cut_equals_left_out(name: str, drop: list[int]) -> None:
    lm, batch = tiny_lm(name), left_padded()
    expected = logits_of(left_out(lm, name, drop), batch)
    assert_same(logits_of(cut_copy(lm, drop), batch), expected)
    assert (expected - logits_of(lm, batch)).abs().max() > 0.1


@family
@dropped
@pytest.mark.parametrize("means", ["bypass", "alpha 0"])
def test_masks_equal_left_out(name: str, drop: list[int], means: str) -> None:
    lm, batch = tiny_lm(name), left_padded()
    expected = logits_of(left_out(lm, name, drop), batch)
    layers = layers_of(lm, name)
    alpha = torch.ones(NUM_LAYERS)
    alpha[drop] = 0
    handles: list[Any] = []
    if means == "alpha 0":
        handles += [attach_gate(layers[index], alpha, index, "residual") for index in range(NUM_LAYERS)]
    if means == "bypass":
        handles += [Bypass(layers[index], index) for index in drop]
    assert_same(logits_of(lm, batch), expected)
    assert_same(cached_logits(lm, batch), expected)
    for handle in handles:
        handle.remove()
    assert_same(logits_of(lm, batch), logits_of(tiny_lm(name), batch), 0)


@family
@dropped
def test_cached_logits_of_the_cut_model(name: str, drop: list[int]) -> None:
    smaller, batch = cut_copy(tiny_lm(name), drop), left_padded()
    assert_same(cached_logits(smaller, batch), logits_of(smaller, batch))


@family
@dropped
def test_every_index_and_config_field_is_right(name: str, drop: list[int]) -> None:
    lm = tiny_lm(name)
    uncut = lm.config.to_dict()
    plan = PruningPlan.dropping(anatomy_of(lm), drop)
    stays = [layer for index, layer in enumerate(layers_of(lm, name)) if index not in drop]
    cut_model(anatomy_of(lm), plan)
    layers = layers_of(lm, name)
    assert len(layers) == lm.config.num_hidden_layers == NUM_LAYERS - len(drop)
    assert all(now is before for now, before in zip(layers, stays, strict=True))
    assert [getattr(layer, ATTENTION.get(name, "self_attn")).layer_idx for layer in layers] == list(range(len(layers)))
    assert lm.config.to_dict() == by_hand.config_fields(uncut, plan)
    assert all(module.config is lm.config for module in lm.modules() if hasattr(module, "config"))


@family
@dropped
def test_plan_foretells_config_and_parameters(name: str, drop: list[int]) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    plan = PruningPlan.dropping(anatomy, drop)
    before = lm.config.to_dict()
    config, count = plan.config(anatomy), resulting_parameters(anatomy, plan)
    assert lm.config.to_dict() == before
    cut_model(anatomy, plan)
    assert config.to_dict() == lm.config.to_dict()
    # `parameters()` hands out tied tensors once.
    assert count == sum(parameter.numel() for parameter in lm.parameters()) == anatomy.num_parameters


@family
@dropped
def test_stock_class_holds_the_cut_model(name: str, drop: list[int]) -> None:
    """A fresh stock model of the plan's config, given the cut model's weights, is the cut model."""
    lm, batch = tiny_lm(name), left_padded()
    smaller = cut_copy(lm, drop)
    stock = type(lm)(PruningPlan.dropping(anatomy_of(lm), drop).config(anatomy_of(lm)))
    stock.load_state_dict(smaller.state_dict(), strict=True)
    assert_same(logits_of(stock, batch), logits_of(smaller, batch), 1e-6)
    heads = {m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (lm, smaller, stock)}
    assert heads == {name.startswith(TIED)}


@family
def test_two_cuts_equal_one(name: str) -> None:
    """What a cut leaves behind is a model that can be cut again; indices are then those of the smaller model."""
    once = tiny_lm(name)
    twice = copy.deepcopy(once)
    plans, rng = [], random.Random(name)
    for _ in range(2):
        plans.append(random_plan(anatomy_of(twice), combinations_of(twice)[-1], rng))
        cut_model(anatomy_of(twice), plans[-1])
    cut_model(anatomy_of(once), plans[0].then(plans[1]))
    assert once.config.to_dict() == twice.config.to_dict()
    assert once.state_dict().keys() == twice.state_dict().keys()
    for key, tensor in once.state_dict().items():
        torch.testing.assert_close(tensor, twice.state_dict()[key], rtol=1e-6, atol=0)
    assert_same(logits_of(once, left_padded()), logits_of(twice, left_padded()), 1e-6)


def test_generation_with_cache_equals_generation_without() -> None:
    for name in FAMILIES:
        smaller = cut_copy(tiny_lm(name), [0, 2, 5]).eval()
        cached, plain = (
            smaller.generate(**left_padded(), max_new_tokens=8, do_sample=False, use_cache=use, eos_token_id=None)
            for use in (True, False)
        )
        assert torch.equal(cached, plain), name


def test_a_plan_that_does_not_fit_leaves_the_model_alone() -> None:
    lm = tiny_lm("llama")
    plan = PruningPlan.dropping(anatomy_of(tiny_lm("llama", num_layers=4)), [1])
    with pytest.raises(ConfigError, match="`layers` is 4, the model's is 6"):
        cut_model(anatomy_of(lm), plan)
    assert len(layers_of(lm, "llama")) == lm.config.num_hidden_layers == NUM_LAYERS


@family
def test_models_built_from_the_same_config_stay_whole(name: str) -> None:
    """A teacher, say: `transformers` builds both on the very config that it is given."""
    teacher = tiny_lm(name)
    lm = type(teacher)(teacher.config)
    assert lm.config is teacher.config
    batch = left_padded()
    before, logits = teacher.config.to_dict(), logits_of(teacher, batch)
    anatomy = anatomy_of(lm)
    cut_model(anatomy, random_plan(anatomy, combinations_of(lm)[-1], random.Random(0)))
    assert teacher.config.to_dict() == before
    assert torch.equal(logits_of(teacher, batch), logits)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays(training: bool) -> None:
    lm = tiny_lm("llama").train(training)
    assert all(module.training is training for module in cut_copy(lm, [1]).modules())


@family
def test_the_list_of_layers_is_edited_in_place(name: str) -> None:
    """Whoever holds it, or keeps something on it, goes on with what is left of it."""
    lm = tiny_lm(name)
    layers = layers_of(lm, name)
    layers.mark = "somebody's"  # type: ignore[assignment]
    kept = [layer for index, layer in enumerate(layers) if index not in (1, 3)]
    anatomy = anatomy_of(lm)
    cut_model(anatomy, PruningPlan.dropping(anatomy, [1, 3]))
    assert layers_of(lm, name) is layers
    assert layers.mark == "somebody's"
    assert [*layers] == kept
    assert [*layers._modules] == [str(index) for index in range(NUM_LAYERS - 2)]


def test_a_profiler_sees_the_cut_through() -> None:
    """DeepSpeed's keeps its counts on every module, and asks the list of layers for them when it ends."""
    profiling = pytest.importorskip("deepspeed.profiling.flops_profiler")
    lm = tiny_lm("llama")
    profiler = profiling.FlopsProfiler(lm)
    profiler.start_profile()
    cut_model(anatomy_of(lm), PruningPlan.dropping(anatomy_of(lm), [1, 3]))
    lm(**left_padded())
    profiler.stop_profile()
    assert profiler.get_total_flops() > 0
    profiler.end_profile()
