"""Budgets as shapes: within the budget, as large as can be, rounded, in proportion, and what the class can have."""

from collections.abc import Collection
from functools import partial
from itertools import combinations

import pytest
from transformers import AutoModelForCausalLM

from lightprune.anatomy import Anatomy, Shape, Structure, anatomy_of
from lightprune.plan import PruningPlan
from lightprune.selectors.budget import _shrunk, shape_within, smallest
from lightprune.surgery import parameters_in_shape, resulting_parameters
from lightprune.surgery.stock_class import check_expressible
from tests.families import FAMILIES, tiny_lm


def parameters(anatomy: Anatomy, shape: Shape) -> int:
    return resulting_parameters(anatomy, PruningPlan.arriving_at(anatomy, shape))


def within(
    anatomy: Anatomy, source: Shape, budget: int, structures: Collection[Structure], multiple_of: int
) -> Shape | None:
    return shape_within(anatomy, source, budget, partial(parameters_in_shape, anatomy), structures, multiple_of)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_of_every_family(name: str) -> None:
    anatomy = anatomy_of(tiny_lm(name, num_layers=4))
    structures = {*anatomy.family.structures, "kv_groups"}
    last = anatomy.num_parameters
    for ratio in (0.9, 0.7, 0.5):
        budget = int(ratio * anatomy.num_parameters)
        shape = within(anatomy, anatomy.shape, budget, structures, 4)
        assert shape is not None
        least = parameters(anatomy, smallest(anatomy, anatomy.shape, structures, 4))
        assert least <= parameters(anatomy, shape) <= min(budget, last)
        plan = PruningPlan.arriving_at(anatomy, shape)
        plan.validate(anatomy)
        check_expressible(anatomy, plan)
        last = parameters(anatomy, shape)


CASES: list[tuple[set[Structure], int]] = [({"channels"}, 1), ({"channels"}, 16), ({"hidden"}, 8), ({"layers"}, 1)]


@pytest.mark.parametrize(("structures", "multiple"), CASES)
def test_one_structure_alone_is_as_large_as_can_be(structures: set[Structure], multiple: int) -> None:
    """By trying every count."""
    anatomy = anatomy_of(tiny_lm("llama_tied"))
    (structure,) = structures
    there = anatomy.shape.count(structure)
    every = [Shape(**{**vars(anatomy.shape), structure: n}) for n in range(multiple, there + 1, multiple)]
    for ratio in (0.95, 0.8, 0.65):
        budget = int(ratio * anatomy.num_parameters)
        fitting = [shape for shape in every if parameters(anatomy, shape) <= budget]
        best = max(fitting, key=lambda shape: shape.count(structure), default=None)
        assert within(anatomy, anatomy.shape, budget, structures, multiple) == best


def test_all_structures_shrink_in_proportion() -> None:
    anatomy = anatomy_of(tiny_lm("llama_tied", hidden_size=128, intermediate_size=256, num_layers=12))
    source = anatomy.shape
    shape = within(anatomy, source, anatomy.num_parameters // 3, {"layers", "channels", "hidden"}, 2)
    assert shape is not None
    ratios = [shape.count(s) / source.count(s) for s in ("layers", "channels", "hidden")]
    assert max(ratios) - min(ratios) < 1 / 12
    assert shape.heads == source.heads


def test_no_shape_on_the_way_is_left_out() -> None:
    """Nine heads over three groups, and channels that are no multiple: every budget gets the best of a dense sweep."""
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 100}
    anatomy = anatomy_of(tiny_lm("llama_tied", num_layers=4, **sizes))
    source, structures = anatomy.shape, {"layers", "heads", "kv_groups", "channels"}
    swept = [_shrunk(source, ratio / 1000, structures, 16) for ratio in range(1, 1000)]
    for target in swept[::10]:
        budget = parameters(anatomy, target)
        shape = within(anatomy, source, budget, structures, 16)
        assert shape is not None
        assert parameters(anatomy, shape) == budget


def test_no_shape_fits() -> None:
    anatomy = anatomy_of(tiny_lm("llama_tied"))
    least = parameters(anatomy, smallest(anatomy, anatomy.shape, {"channels"}, 8))
    assert within(anatomy, anatomy.shape, least - 1, {"channels"}, 8) is None
    found = within(anatomy, anatomy.shape, least, {"channels"}, 8)
    assert found is not None
    assert found.channels == 8


def test_layers_of_two_sizes_stay_within_the_budget_whichever_go() -> None:
    config = tiny_lm("qwen3_moe").config
    config.mlp_only_layers = [0, 1, 2]
    anatomy = anatomy_of(AutoModelForCausalLM.from_config(config))
    budget = anatomy.num_parameters * 2 // 3
    shape = within(anatomy, anatomy.shape, budget, {"layers"}, 1)
    assert shape is not None
    counts = [
        resulting_parameters(anatomy, PruningPlan.keeping(anatomy, layers=kept))
        for kept in combinations(range(6), shape.layers)
    ]
    assert max(counts) == parameters(anatomy, shape) <= budget
