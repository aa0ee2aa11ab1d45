"""Each predicate against the class it speaks for: what it forbids cannot be built, what it allows can."""

import itertools
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from lightprune.anatomy import Shape, anatomy_of
from lightprune.anatomy.shape_rules import even_groups, nearest
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from tests.families import NUM_LAYERS, left_padded, tiny_lm

# Families with a predicate, and what a complaint names.
NAMED = {
    "gemma2": "do not divide them",
    "gemma3": "do not divide them",
    "opt": "has no head_dim of its own",
    "opt_projected": "word_embed_proj_dim=16|has no head_dim of its own",
    "gpt2": "has no head_dim of its own",
    "gpt_neox": "has no head_dim of its own",
    "phi_normed": "with qk_layernorm",
    "phi3_longrope": "4 longrope factors",
}


def can_be_built(lm: PreTrainedModel, plan: PruningPlan) -> bool:
    """Whether the stock class takes the plan's config, sizes its weights as the plan does, and runs."""
    anatomy = anatomy_of(lm)
    shape = plan.shape
    try:
        config = plan.config(anatomy)
        config = type(config).from_dict(config.to_dict())
        config.validate()
        stock = type(lm)(config)
        with torch.no_grad():
            stock(**left_padded(), use_cache=False)
    except (StrictDataclassError, ValueError, RuntimeError):
        return False
    stock_anatomy = anatomy_of(stock)
    widths = {p.shape for key, p in stock.named_parameters() if "q_layernorm" in key or "k_layernorm" in key}
    projected = any("project_in" in key for key, _ in stock.named_parameters())
    return (
        stock_anatomy.shape == shape
        and widths <= {torch.Size([shape.head_dim])}
        and projected == any("project_in" in key for key, _ in lm.named_parameters())
    )


def plan_of(lm: PreTrainedModel, groups: int, queries: int, hidden: int) -> PruningPlan:
    anatomy = anatomy_of(lm)
    per_group = anatomy.shape.heads // anatomy.shape.kv_groups
    heads = [group * per_group + head for group in range(groups) for head in range(queries)]
    return PruningPlan.of(anatomy, heads=[heads] * anatomy.num_layers, hidden=range(hidden))


@pytest.mark.parametrize("name", NAMED)
def test_predicates_tell_what_the_class_can_hold(name: str) -> None:
    lm = tiny_lm(name, num_layers=1)
    shape = anatomy_of(lm).shape
    verdicts = set()
    for groups, hidden in itertools.product(range(1, shape.kv_groups + 1), range(2, 33)):
        for queries in range(1, shape.heads_per_group + 1):
            plan = plan_of(lm, groups, queries, hidden)
            complaints = anatomy_of(lm).family.problems(plan.shape, lm.config)
            assert (not complaints) == can_be_built(lm, plan), plan.shape
            verdicts.add(not complaints)
    assert verdicts == {True, False}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_refused_is_named_with_the_nearest_counts_that_work(name: str) -> None:
    lm = tiny_lm(name, num_layers=1)
    anatomy = anatomy_of(lm)
    refused = 0
    for groups, hidden in itertools.product(range(1, anatomy.shape.kv_groups + 1), range(2, 33, 3)):
        plan = plan_of(lm, groups, anatomy.shape.heads_per_group, hidden)
        try:
            plan.validate(anatomy)
        except ConfigError as error:
            refused += 1
            sentence = str(error)
            assert any(part in sentence for part in NAMED[name].split("|"))
            assert sentence.count(". ") == 0
            options = sentence.partition("(nearest: ")[2].partition(")")[0].split(" or ")
            for option in options:
                heads, _, _, option_hidden, *_ = option.split()
                option_groups = int(heads) // anatomy.shape.heads_per_group
                works = plan_of(lm, option_groups, anatomy.shape.heads_per_group, int(option_hidden))
                works.validate(anatomy)
                assert can_be_built(lm, works)
    assert refused > 10


def test_nearest_is_nearest() -> None:
    """Compared with a search through everything."""
    source = Shape(layers=1, hidden=30, heads=6, kv_groups=3, head_dim=5, channels=4)
    for fits in (
        lambda shape: shape.hidden % shape.heads == 0,
        lambda shape: shape.hidden == 5 * shape.heads,
        lambda shape: shape.hidden == 5 * shape.heads and shape.hidden != 10,
    ):
        for groups, queries, hidden in itertools.product(range(1, 4), range(1, 3), range(1, 31)):
            shape = replace(source, heads=groups * queries, kv_groups=groups, hidden=hidden)
            if fits(shape):
                continue
            of_hidden = [d for d in range(1, 31) if fits(replace(shape, hidden=d))]
            of_groups = [g for g in range(1, 4) if fits(replace(shape, heads=g * queries))]
            options = nearest(shape, source, fits)
            assert all(fits(option) and option.heads == option.kv_groups * queries for option in options)
            least = []
            if of_hidden:
                least.append(min(abs(d - hidden) for d in of_hidden))
            if of_groups:
                least.append(min(abs(g - groups) * queries * 5 for g in of_groups))
            distances = [abs(o.hidden - hidden) + 5 * abs(o.heads - shape.heads) for o in options]
            assert distances == least if least else len(options) <= 1


def test_nearest_changes_both_where_one_is_not_enough() -> None:
    source = Shape(layers=1, hidden=32, heads=4, kv_groups=4, head_dim=8, channels=4)
    refused = replace(source, heads=2, kv_groups=2, hidden=16)
    options = nearest(refused, source, lambda shape: shape.hidden == 8 * shape.heads != 16)
    assert [(o.heads, o.hidden) for o in options] in ([(1, 8)], [(3, 24)])


def test_groups_are_even_or_the_even_counts_are_named() -> None:
    for heads, groups in itertools.product(range(1, 20), range(1, 7)):
        sentence = even_groups(heads, groups)
        if heads / groups == int(heads / groups):
            assert sentence is None
            continue
        assert sentence is not None
        named = [int(word) for word in sentence.partition("nearest: ")[2].split() if word.isdigit()]
        assert named
        assert all(count > 0 and count % groups == 0 and abs(count - heads) < groups for count in named)


def test_layers_may_go_whatever_the_counts() -> None:
    """A cut in depth asks nothing of the widths."""
    for name in NAMED:
        lm = tiny_lm(name)
        assert PruningPlan.dropping(anatomy_of(lm), [0]).shape.layers == NUM_LAYERS - 1
