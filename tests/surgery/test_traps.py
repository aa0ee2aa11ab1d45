"""What is easily forgotten when a stock model is cut, most of it without any error: one test for each."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import NUM_LAYERS, Structures, left_padded, random_plan, tiny_lm
from tests.logits import assert_same, cached_logits, logits_of


def cut(lm: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    smaller = copy.deepcopy(lm)
    cut_model(anatomy_of(smaller), plan)
    return smaller


def reloaded(lm: PreTrainedModel) -> PreTrainedModel:
    """A new model of the class, from nothing but the config's dictionary and the state dict."""
    fresh = type(lm)(type(lm.config).from_dict(lm.config.to_dict()))
    fresh.load_state_dict(lm.state_dict(), strict=True)
    return fresh


def expected_logits(lm: PreTrainedModel, plan: PruningPlan) -> Tensor:
    with masked(anatomy_of(lm), plan):
        return logits_of(lm, left_padded())


def plan_for(lm: PreTrainedModel, *structures: str) -> PruningPlan:
    chosen: Structures = structures
    return random_plan(anatomy_of(lm), chosen, random.Random(1))


def test_layers_without_rotary_positions_stay_without() -> None:
    """SmolLM3 builds every layer from `no_rope_layers`: a stale list gives no error, and other logits."""
    lm = tiny_lm("smollm3")
    assert lm.config.no_rope_layers == [1, 1, 0, 1, 1, 0]
    smaller = cut(lm, plan := PruningPlan.dropping(anatomy_of(lm), [0, 1]))
    assert smaller.config.no_rope_layers == [0, 1, 1, 0]
    assert_same(logits_of(reloaded(smaller), left_padded()), expected_logits(lm, plan))


def test_every_layer_keeps_its_kind_of_attention() -> None:
    """The model picks each layer's mask from the config while it runs; cached logits are as wrong as uncached ones."""
    lm = tiny_lm("qwen2")
    plan = PruningPlan.dropping(anatomy_of(lm), [0])
    assert_same(logits_of(cut(lm, plan), left_padded()), expected_logits(lm, plan))


def test_attention_scaled_by_the_layer_index_is_the_same_after_a_reload() -> None:
    lm = tiny_lm("gpt2_inverse_scale")
    smaller = cut(lm, plan := PruningPlan.dropping(anatomy_of(lm), [1, 3]))
    for model in (smaller, reloaded(smaller)):
        assert_same(logits_of(model, left_padded()), expected_logits(lm, plan))


def test_experts_stay_in_the_layers_that_have_them() -> None:
    """Counted in steps, other layers of Qwen3-MoE would have experts once some are gone."""
    lm = tiny_lm("qwen3_moe")
    smaller = cut(lm, plan := PruningPlan.dropping(anatomy_of(lm), [0, 4]))
    have_experts = [hasattr(layer.mlp, "experts") for layer in smaller.model.layers]
    assert have_experts == [True, False, False, True]  # of layers 1, 2, 3 and 5; layer 3 is named in mlp_only_layers
    assert_same(logits_of(reloaded(smaller), left_padded()), expected_logits(lm, plan))
    again = cut(smaller, PruningPlan.dropping(anatomy_of(smaller), [0]))
    assert_same(logits_of(reloaded(again), left_padded()), logits_of(again, left_padded()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3", "opt"])
def test_the_cache_has_a_slot_for_every_layer(name: str) -> None:
    """A stale `layer_idx` shows with a cache alone."""
    lm = tiny_lm(name)
    smaller = cut(lm, PruningPlan.dropping(anatomy_of(lm), [0, 3]))
    assert_same(cached_logits(smaller, left_padded()), logits_of(smaller, left_padded()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2", "mixtral"])
def test_keys_are_repeated_for_as_many_heads_as_are_left(name: str, implementation: str) -> None:
    """A stale `num_key_value_groups` shows with padding or eager attention alone."""
    lm = tiny_lm(name, attn_implementation=implementation)
    plan = plan_for(lm, "heads")
    assert_same(logits_of(cut(lm, plan), left_padded()), expected_logits(lm, plan))


def test_counts_are_plain_integers() -> None:
    """transformers refuses NumPy's when they are set, JSON when they are written."""
    lm = tiny_lm("llama_tied")
    plan = PruningPlan.keeping(
        anatomy_of(lm),
        layers=np.array([5, 0, 2, 1]),
        heads=np.array([[2, 3], [0, 1]] * 3),
        channels=np.tile(np.arange(20), (NUM_LAYERS, 1)),
        hidden=np.arange(20),
    )
    assert json.loads(plan.to_json())["kept_layers"] == [0, 1, 2, 5]
    config = cut(lm, plan).config
    counts = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.hidden_size)
    assert counts == (4, 2, 1, 20)
    assert {type(count) for count in counts} == {int}


def test_the_config_never_speaks_of_single_layers() -> None:
    """transformers knows `per_layer_config`, and Llama ignores or refuses what it says: every layer keeps as many."""
    lm = tiny_lm("llama")
    plan = plan_for(lm, "layers", "heads", "kv_groups", "channels", "hidden")
    assert len(set(plan.kept_heads or ())) > 1
    config = cut(lm, plan).config
    assert "per_layer_config" not in config.to_dict()
    assert config.to_dict().keys() == lm.config.to_dict().keys()


@pytest.mark.parametrize("says_so", [True, False])
def test_what_is_one_tensor_stays_one_tensor(says_so: bool) -> None:
    """Whatever `tie_word_embeddings` says."""
    lm = tiny_lm("llama_tied")
    lm.config.tie_word_embeddings = says_so
    replaced: list[Tensor] = []
    smaller = copy.deepcopy(lm)
    plan = plan_for(lm, "hidden")
    cut_model(anatomy_of(smaller), plan, lambda old, new, rows: replaced.append(old))
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert len({id(old) for old in replaced}) == len(replaced)
    assert len(list(smaller.parameters())) == len(list(lm.parameters()))


def test_two_tensors_stay_two_tensors() -> None:
    lm = tiny_lm("llama")
    smaller = cut(lm, plan_for(lm, "hidden"))
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight


def test_the_ways_to_compute_stay_as_they_were_chosen() -> None:
    """Attention and experts: mixtures cannot run in double precision on a CPU with any but eager ones."""
    lm = tiny_lm("mixtral", attn_implementation="eager").double()
    lm.config._experts_implementation = "eager"
    plan = plan_for(lm, "layers", "kv_groups")
    smaller = cut(lm, plan)
    for config in (smaller.config, plan.config(anatomy_of(lm))):
        assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")
    assert logits_of(smaller, left_padded()).dtype == torch.float64


def test_norms_without_weights_become_smaller_too() -> None:
    lm = tiny_lm("opt_plain_norms")
    smaller = cut(lm, plan := plan_for(lm, "kv_groups", "hidden"))
    norm = smaller.model.decoder.layers[0].final_layer_norm
    assert norm.weight is None
    assert norm.normalized_shape == (len(plan.kept_hidden or ()),)
    assert_same(logits_of(smaller, left_padded()), expected_logits(lm, plan))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_attention_knows_how_many_heads_are_left(name: str) -> None:
    lm = tiny_lm(name)
    plan = PruningPlan.keeping(anatomy_of(lm), heads=[[0, 1, 3]] * NUM_LAYERS, hidden=range(8, 32))
    smaller = cut(lm, plan)
    attention = smaller.transformer.h[0].attn if name == "gpt2" else smaller.model.decoder.layers[0].self_attn
    assert (attention.num_heads, attention.embed_dim) == (3, 24)
    assert name == "opt" or attention.split_size == 24
    assert_same(logits_of(smaller, left_padded()), expected_logits(lm, plan))


def test_channels_do_not_shrink_with_the_hidden_dimensions() -> None:
    """GPT-2 without `n_inner` has four times as many channels as hidden dimensions: a reload would expect fewer."""
    lm = tiny_lm("gpt2", n_inner=None)
    smaller = cut(lm, plan := plan_for(lm, "kv_groups", "hidden"))
    assert smaller.config.n_inner == 4 * 32
    assert_same(logits_of(reloaded(smaller), left_padded()), expected_logits(lm, plan))


def test_every_segment_of_a_fused_projection_is_cut() -> None:
    """Phi3: queries, then keys, then values; gate, then up."""
    lm = tiny_lm("phi3")
    group_1 = [2, 3]
    plan = PruningPlan.keeping(anatomy_of(lm), heads=[group_1] * NUM_LAYERS, channels=[[0, 5, 47]] * NUM_LAYERS)
    smaller = cut(lm, plan)
    old, new = lm.model.layers[0], smaller.model.layers[0]
    queries, keys, values = old.self_attn.qkv_proj.weight.split([4 * 8, 2 * 8, 2 * 8])
    assert torch.equal(new.self_attn.qkv_proj.weight, torch.cat([queries[16:], keys[8:], values[8:]]))
    gate, up = old.mlp.gate_up_proj.weight.chunk(2)
    assert torch.equal(new.mlp.gate_up_proj.weight, torch.cat([gate[[0, 5, 47]], up[[0, 5, 47]]]))
    assert_same(logits_of(smaller, left_padded()), expected_logits(lm, plan))


def test_query_key_and_value_of_a_head_go_together() -> None:
    """GPT-NeoX: [head, (q, k, v), head_dim], not three blocks."""
    lm = tiny_lm("gpt_neox")
    plan = PruningPlan.keeping(anatomy_of(lm), heads=[[1, 3]] * NUM_LAYERS, hidden=range(16))
    old, new = (model.gpt_neox.layers[0].attention.query_key_value for model in (lm, cut(lm, plan)))
    assert torch.equal(new.weight, old.weight.view(4, 3, 8, 32)[[1, 3], :, :, :16].reshape(48, 16))
    assert torch.equal(new.bias, old.bias.view(4, 3, 8)[[1, 3]].flatten())


def test_transposed_projections_are_cut_along_the_right_dimension() -> None:
    """GPT-2's Conv1D: [in, out], with queries, keys and values as thirds of the outputs."""
    lm = tiny_lm("gpt2")
    plan = PruningPlan.keeping(
        anatomy_of(lm), heads=[[0, 2]] * NUM_LAYERS, channels=[range(10)] * NUM_LAYERS, hidden=range(16)
    )
    old, new = lm.transformer.h[0], cut(lm, plan).transformer.h[0]
    assert torch.equal(new.attn.c_attn.weight, old.attn.c_attn.weight.view(32, 3, 4, 8)[:16, :, [0, 2]].flatten(1))
    assert torch.equal(new.attn.c_proj.weight, old.attn.c_proj.weight.view(4, 8, 32)[[0, 2], :, :16].reshape(16, 16))
    assert (new.mlp.c_fc.weight.shape, new.mlp.c_proj.weight.shape) == ((16, 10), (10, 16))
    assert (new.mlp.c_fc.nx, new.mlp.c_fc.nf, new.attn.c_attn.nx, new.attn.c_attn.nf) == (16, 10, 16, 48)


@pytest.mark.parametrize("name", ["phi", "opt", "gpt2", "gpt_neox"])
def test_a_norm_writes_nothing_to_dimensions_that_go(name: str) -> None:
    """A LayerNorm's bias would; so would statistics over all dimensions be wrong by about 1."""
    lm = tiny_lm(name)
    for key, parameter in lm.named_parameters():
        if key.endswith("bias") and ("norm" in key or ".ln_" in key):
            parameter.data += 3
    plan = plan_for(lm, "hidden") if name == "phi" else plan_for(lm, "kv_groups", "hidden")
    assert_same(logits_of(cut(lm, plan), left_padded()), expected_logits(lm, plan))


@pytest.mark.parametrize("structures", [("heads",), ("kv_groups",)])
def test_norms_over_all_heads_together_lose_the_heads_that_go(structures: Structures) -> None:
    lm = tiny_lm("olmo2")
    smaller = cut(lm, plan := plan_for(lm, *structures))
    attention = smaller.model.layers[0].self_attn
    assert attention.q_norm.weight.shape == (plan.shape.heads * 8,)
    assert attention.k_norm.weight.shape == (plan.shape.kv_groups * 8,)
    assert_same(logits_of(smaller, left_padded()), expected_logits(lm, plan))
