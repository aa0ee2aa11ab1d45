"""The declarations against the models themselves: what every family's file states is where it says."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightprune import ConfigError, anatomy_of
from lightprune.anatomy import FAMILIES as DECLARED
from tests.families import FAMILIES, NUM_LAYERS, left_padded, tiny_lm


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_take_and_return_the_residual_stream(name: str) -> None:
    """In order, each handed on to the next; together with what `output_hidden_states` reports."""
    lm = tiny_lm(name).eval()
    anatomy = anatomy_of(lm)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in anatomy.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        output = lm(**left_padded(), use_cache=False, output_hidden_states=True)
    assert len(seen) == anatomy.num_layers == NUM_LAYERS
    for index, (entering, leaving) in enumerate(seen):
        assert torch.equal(entering, output.hidden_states[index])
        if index + 1 < NUM_LAYERS:
            assert torch.equal(leaving, seen[index + 1][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_counts(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    stored = {tensor.data_ptr(): tensor.numel() for tensor in lm.parameters()}
    assert anatomy.num_parameters == sum(stored.values())
    config = lm.config.to_dict()
    config[anatomy.family.depth_field] = NUM_LAYERS - 1
    if config.get("layer_types") is not None:
        config["layer_types"] = config["layer_types"][1:]
    shallower = type(lm)(type(lm.config).from_dict(config))
    difference = anatomy.num_parameters - sum(p.numel() for p in shallower.parameters())
    assert {anatomy.parameters_of_layer(index) for index in range(NUM_LAYERS)} == {difference}


@pytest.mark.parametrize("name", FAMILIES)
def test_declared_fields_exist(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    stated = lm.config.to_dict()
    assert stated[anatomy.family.depth_field] == NUM_LAYERS
    per_layer = {key for key, value in stated.items() if isinstance(value, (list, tuple)) and len(value) == NUM_LAYERS}
    assert per_layer <= set(anatomy.family.per_layer_fields)
    # Every attribute that holds a layer's index is declared, and nothing else is.
    for index, layer in enumerate(anatomy.layers):
        holders = {
            f"{path}.{key}".removeprefix(".")
            for path, module in layer.named_modules()
            for key in vars(module)
            if key == "layer_idx"
        }
        assert holders == set(anatomy.family.layer_index)
        for path in holders:
            owner, _, key = path.rpartition(".")
            assert getattr(layer.get_submodule(owner), key) == index


def test_every_declared_family_is_tested() -> None:
    tested = {tiny_lm(name, num_layers=1).config.model_type for name in FAMILIES}
    assert tested == {model_type for family in DECLARED for model_type in family.model_types}


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    config = CONFIG_MAPPING["gemma"](
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"'gemma'.*gpt2, gpt_neox, llama, mistral, opt, phi, qwen2, qwen3"):
        anatomy_of(AutoModelForCausalLM.from_config(config))
