"""The gate before training: what no stock class can hold is refused in one sentence, without building weights."""

import dataclasses
import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lightprune.anatomy import Anatomy, anatomy_of
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from lightprune.surgery.stock_class import check_config, check_expressible, stock_form
from tests.families import FAMILIES, combinations_of, random_plan, tiny_lm


def refusal(check: Callable[[], None]) -> str:
    """The sentence with which something is refused."""
    with pytest.raises(ConfigError) as caught:
        check()
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def without_predicates(lm: PreTrainedModel) -> Anatomy:
    """An anatomy whose plans pass whatever the model's class says to them."""
    anatomy = anatomy_of(lm)
    return dataclasses.replace(anatomy, family=dataclasses.replace(anatomy.family, predicates=()))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_can_hold_passes(name: str) -> None:
    lm = tiny_lm(name)
    anatomy, rng = anatomy_of(lm), random.Random(name)
    config, possible = lm.config.to_dict(), combinations_of(lm)
    for structures in rng.sample(possible, min(4, len(possible))) + possible[-1:]:
        check_expressible(anatomy, random_plan(anatomy, structures, rng))
    check_expressible(anatomy, PruningPlan.dropping(anatomy, []))
    assert lm.config.to_dict() == config


HEADS = {"heads": [[0, 1]] * 6}
KV_GROUPS = {"heads": [[0, 1, 2]] * 6}

# Family, what to keep, and a word of who refuses it: the config, the constructor, or the comparison of parameters.
IMPOSSIBLE = {
    "gemma2": ({"hidden": range(30)}, "The hidden size"),
    "gemma3": ({"hidden": range(30)}, "The hidden size"),
    "gpt_neox": (KV_GROUPS, "The hidden size"),
    "gpt2": (KV_GROUPS, "must be divisible by num_heads"),
    "opt": (KV_GROUPS, "must be divisible by num_heads"),
    "phi3_longrope": ({"hidden": range(24)}, "short_factor"),
    "phi_normed": (HEADS, "layernorm.bias: [8], not [16]"),
    "opt_projected": ({"heads": [[0, 1]] * 6, "hidden": range(16)}, "project_in.weight: [16, 16], not none"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_a_family_cannot_hold_is_refused(name: str) -> None:
    """Behind the predicates: these must refuse it first, and the gate whatever they overlook."""
    keep, reason = IMPOSSIBLE[name]
    lm = tiny_lm(name)
    with pytest.raises(ConfigError, match="cannot be exported"):
        PruningPlan.keeping(anatomy_of(lm), **keep)
    anatomy = without_predicates(lm)
    plan = PruningPlan.keeping(anatomy, **keep)

    sentence = refusal(lambda: check_expressible(anatomy, plan))

    assert sentence.startswith("The plan cannot be exported: ")
    assert reason in sentence


def test_a_config_that_forgets_its_kinds_of_layers_is_refused() -> None:
    anatomy = anatomy_of(tiny_lm("qwen2"))
    forgetful = dataclasses.replace(anatomy, family=dataclasses.replace(anatomy.family, per_layer_fields=()))
    sentence = refusal(lambda: check_expressible(forgetful, PruningPlan.dropping(forgetful, [0])))
    assert "Qwen2Config refuses it" in sentence
    assert "layer_types" in sentence


def test_a_mixture_that_forgets_its_dense_layers_is_refused() -> None:
    anatomy = anatomy_of(tiny_lm("qwen3_moe"))
    family = dataclasses.replace(anatomy.family, configure=lambda config, plan: None)
    forgetful = dataclasses.replace(anatomy, family=family)
    assert "mlp" in refusal(lambda: check_expressible(forgetful, PruningPlan.dropping(forgetful, [0])))


def test_a_model_with_something_of_its_own_is_refused() -> None:
    lm = tiny_lm()
    lm.model.adapter = nn.Linear(2, 3)
    plan = PruningPlan.dropping(anatomy_of(lm), [0])
    sentence = refusal(lambda: check_expressible(anatomy_of(lm), plan))
    assert "2 parameters" in sentence
    assert "model.adapter.bias: [3], not none" in sentence


@pytest.mark.parametrize(
    ("biases", "hidden", "kind"),
    [
        ({}, 30, "LlamaForCausalLM"),
        ({}, 31, "MistralForCausalLM"),
        ({"attention_bias": True}, 31, "GraniteForCausalLM"),
        ({"mlp_bias": True}, 31, "GraniteForCausalLM"),
        ({"mlp_bias": True}, 30, "LlamaForCausalLM"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_which_class_a_llama_goes_out_as(biases: dict[str, bool], hidden: int, kind: str, tied: bool) -> None:
    lm = tiny_lm("llama", tie_word_embeddings=tied, **biases)
    anatomy = anatomy_of(lm)
    plan = PruningPlan.keeping(anatomy, heads=[[0, 2]] * 6, hidden=range(hidden))
    check_expressible(anatomy, plan)

    form = stock_form(lm, plan.config(anatomy))

    assert form.model_class.__name__ == kind
    assert (form.reason is None) == (kind == "LlamaForCausalLM")
    stock = form.build()
    assert {p.device.type for p in stock.parameters()} == {"meta"}
    cut_model(anatomy, plan)
    assert {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in lm.named_parameters()}


def test_a_config_without_a_validation_of_its_own_passes() -> None:
    class Plain:
        hidden_size, num_attention_heads = 31, 2

    check_config(Plain())  # type: ignore[arg-type]


def test_it_costs_well_under_a_second() -> None:
    """SmolLM2-135M's shape: 30 layers."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        anatomy = anatomy_of(AutoModelForCausalLM.from_config(config))
    plan = PruningPlan.keeping(anatomy, heads=[range(6)] * 30, channels=[range(1024)] * 30, hidden=range(500))

    def seconds() -> float:
        start = time.perf_counter()
        check_expressible(anatomy, plan)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1
