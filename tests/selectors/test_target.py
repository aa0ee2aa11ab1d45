"""Targets: met from below, never exceeded, by the model that is really cut; refused where nothing can meet them."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightprune as lp
from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.costs import Workload, costs_of
from lightprune.plan import PruningPlan
from tests.families import FAMILIES, tiny_lm
from tests.training import Plain, batches, fit

WORK = Workload(prompt=32, context=64, batch=2)
SERVED = {"prompt": 32, "context": 64, "batch_size": 2}
Measure = Literal["parameters", "flops", "memory"]
MEASURES: tuple[Measure, ...] = ("parameters", "flops", "memory")

pytestmark = pytest.mark.filterwarnings("ignore:.*MLP channels are no multiple of 64")


def measured(anatomy: Anatomy, measure: Measure) -> int:
    costs = costs_of(anatomy, PruningPlan.of(anatomy), WORK)
    return {"parameters": costs.parameters, "flops": costs.prefill, "memory": costs.memory}[measure]


def wide_mlp(name: str) -> Anatomy:
    """A tiny model in which a single channel is a thousandth of most."""
    anatomy = anatomy_of(tiny_lm(name))
    return anatomy_of(tiny_lm(name, **{anatomy.family.channels_field: 1024}))


WIDE = {name: wide_mlp(name) for name in FAMILIES if "channels" in anatomy_of(tiny_lm(name)).family.structures}


# Those whose heads can go without hidden dimensions.
HEADS_TOO = {name for name, anatomy in WIDE.items() if anatomy.family.head_dim_field} - {"phi3_longrope", "phi_normed"}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WIDE)), st.sampled_from(MEASURES), st.floats(0.6, 0.95), st.booleans())
def test_a_target_is_met_from_below(name: str, measure: Measure, share: float, heads_too: bool) -> None:
    """To half a percent, in every family; with heads too, the channels take up what these leave."""
    anatomy = WIDE[name]
    structures: Any = ["kv_groups", "channels"] if heads_too and name in HEADS_TOO else ["channels"]
    target = lp.Target(**{measure: share}, structures=structures, **SERVED)
    shape = target.shape("it", anatomy, anatomy.shape, anatomy.shape, "channels", 1)
    costs = costs_of(anatomy, PruningPlan.arriving_at(anatomy, shape), WORK)
    reached = {"parameters": costs.parameters, "flops": costs.prefill, "memory": costs.memory}[measure]
    budget = int(share * measured(anatomy, measure))
    assert 0.995 * budget <= reached <= budget


def without_layers(name: str, **settings: Any) -> Anatomy:
    lm = tiny_lm(name, num_layers=6)
    fit(Plain(lm), [lp.RandomSelector(**settings, seed=1), lp.StructuredCut(at=1)], batches(2), max_steps=2)
    return anatomy_of(lm)


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_go_until_the_model_is_within(measure: Measure) -> None:
    """One fewer would not do. Gemma 2 has layers with and without a window: whichever go, it is within."""
    target = lp.Target(**{measure: 0.6}, **SERVED)
    for name in ("llama_tied", "gemma2"):
        budget = 0.6 * measured(anatomy_of(tiny_lm(name, num_layers=6)), measure)
        cut = without_layers(name, target=target)
        assert measured(cut, measure) <= budget
        if name == "llama_tied":
            assert measured(without_layers(name, drop=5 - cut.num_layers), measure) > budget


def test_the_model_that_is_cut_meets_it() -> None:
    """Beside a selector of layers: what that takes away counts, and the channels make up for the rest."""
    lm = tiny_lm("llama_tied", intermediate_size=512)
    there = lm.num_parameters()
    selectors = [
        lp.RandomSelector(drop=1),
        lp.ActivationUnitSelector(target=lp.Target(parameters=0.7), multiple_of=2, stop=2),
    ]
    fit(Plain(lm), [*selectors, lp.StructuredCut(at=2)], batches(3), max_steps=3)
    assert 0.995 * 0.7 * there <= lm.num_parameters() <= 0.7 * there
    assert anatomy_of(lm).shape.channels < 512


def test_a_number_is_an_absolute_budget() -> None:
    lm = tiny_lm("llama_tied", intermediate_size=512)
    budget = int(0.8 * lm.num_parameters())
    selector = lp.MagnitudeUnitSelector(target=lp.Target(parameters=budget), multiple_of=1)
    fit(Plain(lm), [selector, lp.StructuredCut(at=1)], batches(2), max_steps=2)
    assert 0.995 * budget <= lm.num_parameters() <= budget


def test_bytes_of_another_dtype() -> None:
    anatomy = WIDE["llama_tied"]
    target = lp.Target(memory=0.5, dtype="bfloat16")
    shape = target.shape("it", anatomy, anatomy.shape, anatomy.shape, "channels", 1)
    work = Workload(dtype=torch.bfloat16)
    before, after = (
        costs_of(anatomy, plan, work).memory
        for plan in (PruningPlan.of(anatomy), PruningPlan.arriving_at(anatomy, shape))
    )
    assert 0.495 * before <= after <= 0.5 * before


@pytest.mark.parametrize(
    ("selector", "sentence"),
    [
        (lambda: lp.RandomSelector(), "RandomSelector.drop is None: it must be a whole number, or `target` a budget."),
        (lambda: lp.RandomSelector(drop=1, target=lp.Target(parameters=0.5)), "are both set: leave one of them out"),
        (lambda: lp.RandomSelector(target=lp.Target()), "target sets no budget: set exactly one of parameters, flops"),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=0.5, flops=0.5)), "target sets parameters, flops"),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=1.5)), "parameters is 1.5: it must be a whole number"),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=0.999)), None),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=10**9)), "keeps all layers: the model is within it"),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=0.01)), "can shrink to [0-9,]+ at the least: raise"),
        (lambda: lp.RandomSelector(target=lp.Target(parameters=0.3), protect_last=4), "or protect fewer layers"),
        (lambda: lp.RandomSelector(target=lp.Target(memory=0.5, context=0)), "target.context is 0"),
        (
            lambda: lp.RandomSelector(target=lp.Target(parameters=0.5, structures=["channels"])),
            r"structures is \['channels'\]: here llama can shrink in layers",
        ),
        (
            lambda: lp.RandomUnitSelector(target=lp.Target(parameters=0.5, structures=["layers"])),
            "here llama can shrink in heads, kv_groups, channels, hidden",
        ),
        (lambda: lp.RandomUnitSelector(target=lp.Target(parameters=0.5), channels=8), "target is set, and counts"),
    ],
)
def test_what_cannot_be_met_is_refused(selector: Any, sentence: str | None) -> None:
    module = Plain(tiny_lm("llama_tied"))
    if sentence is None:
        fit(module, [selector(), lp.StructuredCut(at=1)], batches(2), max_steps=2)
        return
    with pytest.raises(lp.ConfigError, match=sentence):
        fit(module, [selector(), lp.StructuredCut(at=1)], batches(2), max_steps=2)


def test_one_target_a_cut() -> None:
    target = lp.Target(parameters=0.6)
    selectors = [lp.RandomSelector(target=target), lp.RandomUnitSelector(target=target)]
    with pytest.raises(lp.ConfigError, match="are set for one cut"):
        fit(Plain(tiny_lm("llama_tied")), [*selectors, lp.StructuredCut(at=1)], batches(2), max_steps=2)
