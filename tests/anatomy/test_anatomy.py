"""The declarations against the models themselves: what every family's file states is where it says."""

import re

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lightprune import ConfigError, anatomy_of
from lightprune.anatomy import FAMILIES as DECLARED
from lightprune.anatomy import Shape
from lightprune.anatomy.axes import HIDDEN, length
from tests.families import CHECKED_ALONE, FAMILIES, NUM_LAYERS, left_padded, tiny_lm

MIXTURES = ("mixtral", "qwen3_moe")


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
    ungrouped = name.startswith(("opt", "gpt")) or name == "phi"
    head_dim = 12 if name in ("qwen3", "gemma2", "gemma3") else 8
    assert anatomy.shape == Shape(
        layers=6, hidden=32, heads=4, kv_groups=4 if ungrouped else 2, head_dim=head_dim, channels=48
    )
    stored = {tensor.data_ptr(): tensor.numel() for tensor in lm.parameters()}
    assert anatomy.num_parameters == sum(stored.values())


def test_what_a_config_leaves_out() -> None:
    """GPT-2's channels are four times its hidden dimensions; without key-value heads, every head is one."""
    anatomy = anatomy_of(tiny_lm("gpt2", n_inner=None))
    assert (anatomy.shape.channels, anatomy.shape.kv_groups, anatomy.shape.head_dim) == (128, 4, 8)
    assert anatomy_of(tiny_lm("llama", head_dim=None)).shape.head_dim == 8
    assert anatomy_of(tiny_lm("mixtral")).config.head_dim is None


@pytest.mark.parametrize("name", FAMILIES)
def test_structures(name: str) -> None:
    structures = anatomy_of(tiny_lm(name)).family.structures
    assert structures - {"kv_groups"} == {"layers", "heads"} | (set() if name in MIXTURES else {"channels", "hidden"})


@pytest.mark.parametrize("name", FAMILIES)
def test_axes_are_as_long_as_the_weights(name: str) -> None:
    anatomy = anatomy_of(tiny_lm(name))
    found = 0
    for weight in anatomy.weights():
        found += 1
        assert weight.parameter is anatomy.lm.get_parameter(weight.path)
        assert weight.layer == next((int(i) for i in re.findall(r"(?:layers|h)\.(\d+)\.", weight.path)), None)
        for size, axis in zip(weight.parameter.shape, weight.axes, strict=True):
            assert axis is None or length(axis, anatomy.shape) == size
    assert found > NUM_LAYERS * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_overlooked(name: str) -> None:
    """What is declared of no weight are vocabularies, positions, per-head norms, and the inside of mixtures."""
    anatomy = anatomy_of(tiny_lm(name))
    declared = {weight.path for weight in anatomy.weights()}
    others = {key for key, _ in anatomy.lm.named_parameters(remove_duplicate=False)} - declared
    whole = r"\.[qk]_(norm|layernorm)\.|lm_head\.bias"
    if name in MIXTURES:
        whole += r"|mlp\.|layernorm|model\.norm|embed_tokens|lm_head"
    if name == "opt_projected":
        whole += r"|embed_tokens|lm_head"
    assert [key for key in others if not re.search(whole, key)] == []
    assert name != "olmo2" or not others


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MIXTURES])
def test_every_module_that_writes_to_the_residual_stream_is_known(name: str) -> None:
    """By its size alone: whatever gives as many numbers as there are hidden dimensions, and no other."""
    lm = tiny_lm(name, **({"n_embd": 40, "n_head": 5} if name.startswith("gpt2") else wider(name)))
    anatomy = anatomy_of(lm)
    hidden = anatomy.shape.hidden
    writers = set()
    for path, module in lm.named_modules():
        size = (
            module.out_features
            if isinstance(module, nn.Linear)
            else module.nf
            if isinstance(module, Conv1D)
            else module.embedding_dim
            if isinstance(module, nn.Embedding)
            else None
        )
        # Queries fill the hidden dimensions too where a class has no head_dim: they are none.
        if size == hidden and not re.search(r"[qkv]_proj$", path):
            writers.add(path)
    assert {site.path for site in anatomy.sites() if site.writes_hidden} == writers
    norms = {site.path for site in anatomy.sites() if site.is_norm and site.axes == (HIDDEN,)}
    assert norms == {
        path for path, m in lm.named_modules() if "Norm" in type(m).__name__ and not re.search(r"[qk]_\w*norm$", path)
    }


def wider(name: str) -> dict[str, int]:
    """Hidden dimensions that no other count equals by chance."""
    if name.startswith("opt"):
        return {"hidden_size": 40, "num_attention_heads": 5} | ({} if "proj" in name else {"word_embed_proj_dim": 40})
    return {"hidden_size": 40, "num_attention_heads": 5} if name.startswith("gpt_neox") else {}


@pytest.mark.parametrize("name", FAMILIES)
def test_declared_fields_exist(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    stated = lm.config.to_dict()
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


SEEING = {"gemma3", "llava", "qwen2_5_vl"}  # in `test_multimodal.py`


def test_every_declared_family_is_tested() -> None:
    tested = {tiny_lm(name, num_layers=1).config.model_type for name in FAMILIES}
    assert tested | {*CHECKED_ALONE} | SEEING == {
        model_type for family in DECLARED for model_type in family.model_types
    }


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    config = CONFIG_MAPPING["gemma"](
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32,
    )  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"'gemma'.*known: arcee, ernie4_5, gemma2, .* smollm3, starcoder2\).*register_family",
    ):
        anatomy_of(AutoModelForCausalLM.from_config(config))
