"""The model card, line by line."""

import torch

import lightprune
from lightprune.anatomy import anatomy_of
from lightprune.export import model_card
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.export.models import without_middle_layers
from tests.families import tiny_lm


def test_a_cut_in_depth() -> None:
    lm = tiny_lm(num_layers=4)
    before = lm.num_parameters()
    plan = without_middle_layers(lm)

    card = model_card(
        lm,
        plan,
        {
            "parameters": {"before": before, "after": lm.num_parameters()},
            "data": {"domains": "code, web"},
            "metrics": {"before the cut": {"val/ppl": 31.25}, "last validation": {"val/ppl": 33.5, "val/loss": 3.5}},
        },
    )

    front, body = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    assert "library_name: transformers" in front.splitlines()
    assert "- pruned" in front.splitlines()
    assert "base_model" not in front
    for line in (
        "| layers | 4 | 2 |",
        "| hidden dimensions | 32 | 32 |",
        f"| parameters | {before:,} | {lm.num_parameters():,} |",
        "Layers 1, 2, counted from 0.",
        "| selector | by hand |",
        "| domains | code, web |",
        "|  | before the cut | last validation |",
        "| val/ppl | 31.25 | 33.5 |",
        "| val/loss |  | 3.5 |",
        f"| torch | {torch.__version__} |",
        f"| lightprune | {lightprune.__version__} |",
    ):
        assert line in body, card
    assert "In each layer" not in body


def test_a_cut_in_width() -> None:
    lm = tiny_lm(num_layers=2)
    anatomy = anatomy_of(lm)
    narrow = PruningPlan.keeping(anatomy, heads=[[0], [3]], channels=[range(7)] * 2, selector="A", seed=1)
    plan = narrow.merged(PruningPlan.keeping(anatomy, hidden=range(20), selector="B"))
    cut_model(anatomy, plan)

    card = model_card(lm, plan, {}, ["Saved as something else."])

    for line in (
        "\nSaved as something else.\n",
        "| layers | 2 | 2 |",
        "| hidden dimensions | 32 | 20 |",
        "| query heads | 4 | 1 |",
        "| key-value groups | 2 | 1 |",
        "| MLP channels | 48 | 7 |",
        "12 of 32 hidden dimensions. "
        "In each layer, 3 of 4 query heads, 1 of 2 key-value groups, 41 of 48 MLP channels. ",
        "| selector | A |\n| seed | 1 |",
        "| selector | B |",
    ):
        assert line in card, card
    assert "Layers" not in card


def test_a_plan_of_several_cuts() -> None:
    lm = tiny_lm(num_layers=4)
    anatomy = anatomy_of(lm)
    first = PruningPlan.dropping(anatomy, [3], selector="A").merged(
        PruningPlan.keeping(anatomy, hidden=range(20), selector="B")
    )
    cut_model(anatomy, first)
    second = PruningPlan.dropping(anatomy, [1], selector="C")
    cut_model(anatomy, second)

    card = model_card(lm, first.then(second), {})

    assert "Layers 1, 3, counted from 0. 12 of 32 hidden dimensions. `pruning_plan.json`" in card
    assert [line for line in card.splitlines() if line.startswith("| selector")] == [
        "| selector | A |",
        "| selector | B |",
        "| selector | C |",
    ]


def test_a_base_model_from_the_hub() -> None:
    lm = tiny_lm(num_layers=2)
    lm.name_or_path = "org/name"

    assert "\nbase_model: org/name\n" in model_card(lm, None, {})
