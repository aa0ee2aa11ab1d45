"""`lightprune.testing.check_family`: right declarations pass, wrong ones are told apart."""

from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from lightprune.anatomy import CHANNELS, HIDDEN, anatomy_of, families
from lightprune.testing import check_family
from tests.families import CHECKED_ALONE, FAMILIES, tiny_lm


@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_families(name: str) -> None:
    lm = tiny_lm(name, num_layers=3)
    plans = check_family(anatomy_of(lm).family, lm.config)
    assert {"layers"} <= {structure for plan in plans for structure in plan.structures}


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "head_dim": 8,
}


@pytest.mark.parametrize("model_type", CHECKED_ALONE)
def test_families_that_pass_this_check_alone(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**SHAPE)
    family = next(family for family in families() if model_type in family.model_types)
    assert len(check_family(family, config)) == 6


def test_a_weight_that_is_declared_as_something_else() -> None:
    lm = tiny_lm("llama", num_layers=2)
    family = anatomy_of(lm).family
    wrong = replace(family, weights={**family.weights, "mlp.down_proj": (CHANNELS, HIDDEN)})
    with pytest.raises(AssertionError, match=r"model.layers.0.mlp.down_proj.weight has the shape \[32, 48\]"):
        check_family(wrong, lm.config)


def test_a_weight_that_is_forgotten() -> None:
    lm = tiny_lm("qwen2", num_layers=2)
    family = anatomy_of(lm).family
    wrong = replace(family, weights={n: a for n, a in family.weights.items() if n != "input_layernorm"})
    with pytest.raises(AssertionError, match=r"the cut model does not run .* is not declared"):
        check_family(wrong, lm.config)
