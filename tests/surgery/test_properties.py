"""Whatever the sizes and whatever the plan: logits are right, or the plan is refused in a sentence that says why."""

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.errors import ConfigError
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model, resulting_shapes
from tests.families import FAMILIES, combinations_of, holds, left_padded, random_plan, tiny_lm, tokens
from tests.logits import assert_same, logits_of

UNGROUPED = ("opt", "opt_projected", "opt_plain_norms", "gpt2", "gpt2_inverse_scale", "gpt_neox", "gpt_neox_sequential")
# Their configs say how wide a head is; of the others' it is hidden // heads.
HEAD_DIM_STATED = ("llama", "llama_tied", "mistral", "qwen3", "gemma2", "gemma3", "qwen3_moe", "mixtral")
GEMMA = ("gemma2", "gemma3")
# Where the part of a head that is rotated, or is a list of factors long, must come out even.
HEAD_DIMS = {
    "phi3_longrope": [8],
    "gpt_neox": [8, 16],
    "gpt_neox_sequential": [8, 16],
    "phi": [4, 8, 12],
    "phi_normed": [4, 8, 12],
}


def examples(count: int) -> settings:
    """The same examples in every run."""
    unhurried = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=unhurried)


@st.composite
def models(draw: st.DrawFn) -> tuple[str, PreTrainedModel]:
    """A model of two layers, of any family and of any sizes that the family's class can have; in double precision."""
    name = draw(st.sampled_from(FAMILIES))
    per_group = 1 if name in (*UNGROUPED, "phi") else draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    heads = groups * per_group
    head_dim = draw(st.sampled_from(HEAD_DIMS.get(name, [4, 6, 8, 12])))
    hidden = heads * head_dim
    if name in HEAD_DIM_STATED:  # a multiple of heads: Llama and Gemma ask for it
        hidden = heads * draw(st.integers(max(1, -(-6 // heads)), 12))
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads}
    channels = draw(st.integers(2, 20))
    if name.startswith("gpt2"):
        sizes = {"n_embd": hidden, "n_head": heads, "n_inner": draw(st.sampled_from([None, channels]))}
    elif name.startswith("opt"):
        sizes |= {"ffn_dim": channels}
        sizes["word_embed_proj_dim"] = hidden + 3 if name == "opt_projected" else hidden
        if name == "opt_projected" and groups > 1:
            sizes["word_embed_proj_dim"] = draw(st.sampled_from([head_dim, hidden + 3]))
    else:
        sizes["intermediate_size"] = channels
    if name not in UNGROUPED:
        sizes["num_key_value_heads"] = groups
    if name in HEAD_DIM_STATED:
        sizes["head_dim"] = head_dim
    lm = tiny_lm(name, num_layers=2, seed=draw(st.integers(0, 3)), **sizes).double().eval()
    lm.config._experts_implementation = "eager"
    return name, lm


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """Padded on the left, but for Gemma 2, whose eager attention gives padding NaN in double precision."""
    if name == "gemma2":
        return {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    return left_padded(2, 8)


@examples(300)
@given(models(), st.data())
def test_a_plan_that_passes_gives_the_right_logits(model: tuple[str, PreTrainedModel], data: st.DataObject) -> None:
    name, lm = model
    anatomy, batch = anatomy_of(lm), batch_for(name)
    possible = combinations_of(lm)
    assume(possible)  # else it is as small as it gets
    plan = random_plan(anatomy, data.draw(st.sampled_from(possible)), data.draw(st.randoms(use_true_random=False)))
    assert PruningPlan.from_json(plan.to_json()) == plan
    with masked(anatomy, plan):
        expected = logits_of(lm, batch)
    shapes = resulting_shapes(anatomy, plan)

    smaller = copy.deepcopy(lm)
    cut_model(anatomy_of(smaller), plan)

    # Norms that compute in single precision may round differently where sums are taken in another order.
    assert_same(logits_of(smaller, batch), expected, 1e-7)
    assert {key: parameter.shape for key, parameter in smaller.named_parameters()} == shapes
    config = smaller.config
    if config.model_type == "llama" and config.hidden_size % config.num_attention_heads:
        return  # the export writes another class
    stock = type(lm)(type(config).from_dict(config.to_dict())).double()
    stock.config._experts_implementation = "eager"
    stock.load_state_dict(smaller.state_dict(), strict=True)
    if name in GEMMA and plan.shape.hidden != plan.source.hidden:
        return  # the export folds the embedding's old scale in
    assert_same(logits_of(stock, batch), expected, 1e-7)


def uneven(anatomy: Anatomy, rng: random.Random) -> PruningPlan | None:
    shape = anatomy.shape
    if shape.heads_per_group == 1 or shape.kv_groups == 1:
        return None
    heads = sorted({0, *range(shape.heads_per_group, shape.heads)})  # one of group 0, all of the others
    return PruningPlan.of(anatomy, heads=[heads] * shape.layers)


def other_heads_in_one_layer(anatomy: Anatomy, rng: random.Random) -> PruningPlan | None:
    if anatomy.shape.heads == 1:
        return None
    return PruningPlan.of(anatomy, heads=[range(anatomy.shape.heads), [0]])


def other_groups_in_one_layer(anatomy: Anatomy, rng: random.Random) -> PruningPlan | None:
    shape = anatomy.shape
    if shape.heads_per_group == 1 or shape.kv_groups == 1:
        return None
    count = min(shape.heads_per_group, shape.kv_groups)
    return PruningPlan.of(anatomy, heads=[range(count), [group * shape.heads_per_group for group in range(count)]])


def other_channels_in_one_layer(anatomy: Anatomy, rng: random.Random) -> PruningPlan:
    return PruningPlan.of(anatomy, channels=[range(anatomy.shape.channels - 1), range(anatomy.shape.channels)])


def out_of_range(anatomy: Anatomy, rng: random.Random) -> PruningPlan:
    shape = anatomy.shape
    name = rng.choice(["layers", "heads", "channels", "hidden"])
    count = shape.count(name)
    entry = rng.choice([[0, count], [-1], [count + 7], [], [0, 0]])
    kept: dict[str, Any] = {name: entry if name in ("layers", "hidden") else [entry, entry]}
    return PruningPlan.of(anatomy, **kept)


def a_layer_too_many(anatomy: Anatomy, rng: random.Random) -> PruningPlan:
    of_layers = [[0]] * rng.choice([1, 3])
    kept: dict[str, Any] = {rng.choice(["heads", "channels"]): of_layers}
    return PruningPlan.of(anatomy, **kept)


def of_another_model(anatomy: Anatomy, rng: random.Random) -> PruningPlan:
    plan = PruningPlan.of(anatomy, layers=[0])
    if rng.random() < 0.2:
        return dataclasses.replace(plan, model_type="bloom")
    field = rng.choice([field.name for field in dataclasses.fields(plan.source)])
    return dataclasses.replace(plan, source=dataclasses.replace(plan.source, **{field: 99}))


def inexpressible(anatomy: Anatomy, rng: random.Random) -> PruningPlan | None:
    """Counts that the class cannot hold, by what `tests.families` says of it."""
    shape, per_group = anatomy.shape, anatomy.shape.heads_per_group
    if anatomy.model_type in ("mixtral", "qwen3_moe"):
        return PruningPlan.of(anatomy, hidden=range(shape.hidden - 1))
    impossible = [
        (groups, hidden)
        for groups in range(1, shape.kv_groups + 1)
        for hidden in range(1, shape.hidden + 1)
        if not holds(anatomy.config, shape.head_dim, groups * per_group, hidden)
    ]
    if not impossible:
        return None
    groups, hidden = rng.choice(impossible)
    return PruningPlan.of(anatomy, heads=[range(groups * per_group)] * shape.layers, hidden=range(hidden))


# What is wrong with a plan, and words of the sentence that must say so, any one of them.
WRONG = {
    uneven: ("do not divide evenly among", "its groups keep from"),
    other_heads_in_one_layer: ("entries a layer: every layer of a stock model has the same count",),
    other_groups_in_one_layer: ("key-value groups a layer: every layer of a stock model has the same count",),
    other_channels_in_one_layer: ("entries a layer: every layer of a stock model has the same count",),
    out_of_range: ("at least one distinct index from 0 to", "is empty: no stock class has a layer without"),
    a_layer_too_many: ("one for each of the model's 2 layers",),
    of_another_model: ("made for another model",),
    inexpressible: (
        "has no head_dim of its own",
        "which do not divide them",
        "with qk_layernorm",
        "longrope factors",
        "drops its embedding projections",
        "can be pruned in heads, kv_groups, layers",
    ),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@examples(30)
@given(model=models(), rng=st.randoms(use_true_random=False))
def test_a_plan_that_cannot_be_is_refused(wrong: Any, model: tuple[str, PreTrainedModel], rng: random.Random) -> None:
    _, lm = model
    plan = wrong(anatomy_of(lm), rng)
    assume(plan is not None)  # else no such mistake can be made about this model
    before = {key: id(parameter) for key, parameter in lm.named_parameters()}
    with pytest.raises(ConfigError) as refusal:
        cut_model(anatomy_of(lm), plan)
    assert any(words in str(refusal.value) for words in WRONG[wrong])
    assert {key: id(parameter) for key, parameter in lm.named_parameters()} == before
