"""Models that go out as something else than they are in memory: another class, or other weights."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.export import export_hf
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from lightprune.surgery.stock_class import check_expressible
from tests.export.stranger import seen_by_a_stranger
from tests.families import left_padded, tiny_lm
from tests.logits import assert_same, logits_of

BIASES = {"none": {}, "attention": {"attention_bias": True}, "mlp": {"mlp_bias": True}}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 777.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


def llama(**fields: Any) -> PreTrainedModel:
    """A tiny Llama without biases whose every setting is off its default."""
    defaults = {
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": ROPE,
        "rms_norm_eps": 0.02,
        "hidden_act": "gelu",
        "eos_token_id": [2, 5],
        "bos_token_id": 3,
        "pad_token_id": 4,
        "initializer_range": 0.07,
    }
    lm = tiny_lm("llama", num_layers=3, **(defaults | fields)).eval()
    assert isinstance(lm, LlamaForCausalLM)
    lm.generation_config = GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=[2, 5], pad_token_id=4)
    return lm


def narrow_plan(lm: PreTrainedModel, *, hidden: int) -> PruningPlan:
    """A plan that keeps one query head in each of two groups, different ones in each layer, and `hidden` of 32."""
    rng, anatomy = random.Random(hidden), anatomy_of(lm)
    return PruningPlan.keeping(
        anatomy,
        heads=[[rng.choice((0, 1)), rng.choice((2, 3))] for _ in range(anatomy.num_layers)],
        hidden=rng.sample(range(anatomy.shape.hidden), hidden),
    )


def test_a_llama_whose_heads_do_not_divide_goes_out_as_what_can_hold_it(tmp_path: Path) -> None:
    batch, paths, expected = left_padded(), {}, {}
    for biases, fields in BIASES.items():
        for tied in (True, False):
            name = f"{biases}-{'tied' if tied else 'untied'}"
            lm = llama(tie_word_embeddings=tied, **fields)
            anatomy = anatomy_of(lm)
            plan = narrow_plan(lm, hidden=27)
            check_expressible(anatomy, plan)
            with masked(anatomy, plan):
                expected[name] = logits_of(lm, batch)
            cut_model(anatomy, plan)
            paths[name] = export_hf(lm, tmp_path / name, plan=plan)

    for name, seen in seen_by_a_stranger(paths, batch, tmp_path).items():
        assert seen["kind"] == ("MistralForCausalLM" if name.startswith("none") else "GraniteForCausalLM")
        assert seen["report"] == []
        assert seen["tied"] == name.endswith("-tied")
        assert seen["same_generation"]
        assert_same(seen["logits"], expected[name])
        assert_same(seen["cached"], expected[name])
        card = (paths[name] / "README.md").read_text()
        assert f"Saved as `{seen['kind']}`, not `LlamaForCausalLM`: `LlamaConfig` refuses 27 hidden dimensions" in card


@pytest.mark.parametrize(("biases", "model_type"), [("none", "mistral"), ("attention", "granite"), ("mlp", "granite")])
def test_the_settings_of_a_llama_go_along(biases: str, model_type: str, tmp_path: Path) -> None:
    lm = llama(tie_word_embeddings=True, max_position_embeddings=48, **BIASES[biases]).to(torch.bfloat16)
    lm.config.sliding_window = 2  # to a Llama this means nothing, and so must it after
    lm.config.embedding_multiplier = 7.0
    lm.config.layer_types = ["sliding_attention"] * 3
    cut_model(anatomy_of(lm), narrow_plan(lm, hidden=31))

    path = export_hf(lm, tmp_path / "out")

    written = json.loads((path / "config.json").read_text())
    expected = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 31,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "hidden_act": "gelu",
        "rms_norm_eps": 0.02,
        "max_position_embeddings": 48,
        "initializer_range": 0.07,
        "tie_word_embeddings": True,
        "bos_token_id": 3,
        "eos_token_id": [2, 5],
        "pad_token_id": 4,
        "rope_parameters": ROPE,
    }
    loaded = AutoConfig.from_pretrained(path).to_dict()
    assert {name: loaded.get(name) for name in expected} == expected
    assert written["head_dim"] == 8  # stated, not left to hidden // heads
    if model_type == "mistral":
        assert written["sliding_window"] is None
    else:
        assert loaded["attention_bias"] == (biases == "attention")
        assert loaded["mlp_bias"] == (biases == "mlp")
        assert loaded["attention_multiplier"] == 8**-0.5
        assert [loaded[f"{of}_multiplier"] for of in ("embedding", "residual")] == [1, 1]
        assert loaded["logits_scaling"] == 1
    generation = GenerationConfig.from_pretrained(path)
    assert (generation.do_sample, generation.temperature, generation.eos_token_id) == (True, 0.3, [2, 5])


@pytest.mark.parametrize(
    ("hidden", "kind"), [(432, "LlamaForCausalLM"), (500, "MistralForCausalLM")], ids=["divides", "does not"]
)
def test_the_shape_of_smollm2(hidden: int, kind: str, tmp_path: Path) -> None:
    """9 heads in 3 groups to 6 in 2, 576 hidden dimensions to 432, which 6 divides, or 500, which it does not."""
    lm = tiny_lm(
        "llama",
        num_layers=2,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=96,
        tie_word_embeddings=True,
    ).eval()
    for parameter in lm.parameters():  # wide layers want small weights
        if parameter.ndim == 2:
            parameter.data /= 5
    anatomy, batch = anatomy_of(lm), left_padded()
    rng = random.Random(0)
    plan = PruningPlan.keeping(
        anatomy,
        heads=[[3 * group + head for group in rng.sample(range(3), 2) for head in range(3)] for _ in range(2)],
        channels=[rng.sample(range(96), 64) for _ in range(2)],
        hidden=rng.sample(range(576), hidden),
    )
    check_expressible(anatomy, plan)
    with masked(anatomy, plan):
        expected = logits_of(lm, batch)
    cut_model(anatomy, plan)

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out", plan=plan))

    assert type(loaded).__name__ == kind
    shape = loaded.config.num_attention_heads, loaded.config.num_key_value_heads, loaded.config.hidden_size
    assert shape == (6, 2, hidden)
    assert_same(logits_of(loaded, batch), expected)


class OwnLlama(LlamaForCausalLM):
    """A class of somebody's own, of which nobody knows what it computes."""


def test_only_the_stock_llama_is_converted(tmp_path: Path) -> None:
    stock = llama()
    lm = OwnLlama(stock.config)
    plan = narrow_plan(lm, hidden=27)
    sentence = r"27 hidden dimensions with 2 heads.*stand in for OwnLlama.*keep 26 or 28 hidden dimensions\.$"
    with pytest.raises(ConfigError, match=sentence):
        check_expressible(anatomy_of(lm), plan)
    cut_model(anatomy_of(lm), plan)
    with pytest.raises(ConfigError, match=sentence):
        export_hf(lm, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def byte_level() -> Tokenizer:
    """A byte-level BPE with one merge, as SmolLM2's and Llama 3's have many."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate([*alphabet, "he"])}, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def llama2() -> PreTrainedTokenizerBase:
    """A BPE over words that begin with a mark, as Llama 2's."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *"adehiks", "he", "▁he"])}
    return LlamaTokenizer(vocab=vocabulary, merges=[("h", "e"), ("▁", "he")])


TOKENIZERS = {
    "plain": lambda: PreTrainedTokenizerFast(tokenizer_object=byte_level()),
    "gpt2": lambda: GPT2Tokenizer(tokenizer_object=byte_level()),
    "llama2": llama2,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("biases", ["none", "attention"])
def test_another_class_of_model_has_the_same_tokenizer(biases: str, kind: str, tmp_path: Path) -> None:
    """`AutoTokenizer` looks at the model's class too, and has ways of its own with Mistral's."""
    tokenizer, text = TOKENIZERS[kind](), "he said: 1234 hehe\n\n  sHe…"
    expected = tokenizer(text)["input_ids"]
    lm = llama(**BIASES[biases])
    cut_model(anatomy_of(lm), narrow_plan(lm, hidden=27))

    reloaded = AutoTokenizer.from_pretrained(export_hf(lm, tmp_path / "out", tokenizer=tokenizer))

    assert reloaded(text)["input_ids"] == expected
    assert reloaded.decode(expected) == tokenizer.decode(expected)


def snapshot(lm: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that an export might change."""
    return {
        "class": type(lm),
        "config": copy.deepcopy(lm.config.to_dict()),
        "generation": lm.generation_config.to_dict(),
        "identities": {name: id(tensor) for name, tensor in lm.named_parameters(remove_duplicate=False)},
        "values": {name: tensor.tolist() for name, tensor in (*lm.named_parameters(), *lm.named_buffers())},
        "modes": [module.training for module in lm.modules()],
    }


@pytest.mark.parametrize("make", [llama, lambda: tiny_lm("gemma2", num_layers=3)], ids=["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_model_in_memory_is_left_as_it_was(make: Any, dtype: Any, tmp_path: Path) -> None:
    lm = make()
    lm.config.use_cache = False
    cut_model(anatomy_of(lm), narrow_plan(lm, hidden=26 if lm.config.model_type == "gemma2" else 27))
    before = snapshot(lm)

    path = export_hf(lm, tmp_path / "out", dtype=dtype)

    assert snapshot(lm) == before
    assert AutoConfig.from_pretrained(path).use_cache


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_keeps_the_scale_of_its_embedding(name: str, tied: bool, tmp_path: Path) -> None:
    """A reloaded Gemma scales by the root of what is left; the factor lies in the embedding, and nowhere else."""
    lm, batch = tiny_lm(name, num_layers=3, tie_word_embeddings=tied).eval(), left_padded()
    anatomy = anatomy_of(lm)
    plan = narrow_plan(lm, hidden=18)
    with masked(anatomy, plan):
        expected = logits_of(lm, batch)
    cut_model(anatomy, plan)

    path = export_hf(lm, tmp_path / "out", plan=plan)

    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert_same(logits_of(loaded, batch), expected)
    ours, theirs = lm.state_dict(), loaded.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    embedding = {"model.embed_tokens.weight"}
    assert changed == embedding | ({"lm_head.weight", "model.norm.weight"} if tied else set())
    torch.testing.assert_close(
        theirs["model.embed_tokens.weight"] * 18**0.5, ours["model.embed_tokens.weight"] * 32**0.5
    )
    assert "The embedding carries a factor of 1.33" in (path / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gemma_in_half_precision(dtype: Any, tmp_path: Path) -> None:
    lm = tiny_lm("gemma2", num_layers=3).to(getattr(torch, dtype)).eval()
    cut_model(anatomy_of(lm), narrow_plan(lm, hidden=18))

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out"))

    scaled = [m.get_input_embeddings()(torch.arange(64)).float() for m in (loaded, lm)]
    torch.testing.assert_close(*scaled, rtol=0.02, atol=0)


def test_gemma_without_a_cut_in_width_keeps_its_weights(tmp_path: Path) -> None:
    """Also after `bf16-true`, which rounds the scale in memory: a reloaded model rounds it the same way."""
    lm = tiny_lm("gemma2", num_layers=3, hidden_size=40).to(torch.bfloat16).eval()
    assert lm.get_input_embeddings().embed_scale.item() != torch.tensor(40.0).sqrt().item()
    cut_model(anatomy_of(lm), PruningPlan.dropping(anatomy_of(lm), [1]))

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out"))

    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in lm.state_dict().items())


def test_a_rounded_scale_is_carried_into_float32(tmp_path: Path) -> None:
    """Trained in bfloat16 with a scale that is rounded there, exported in float32 where it is not."""
    lm, batch = tiny_lm("gemma2", num_layers=3, hidden_size=40).to(torch.bfloat16).eval(), left_padded()
    rounded = lm.get_input_embeddings().embed_scale.item()
    assert rounded != torch.tensor(40.0).sqrt().item()

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out", dtype="float32"))

    embedding = lm.get_input_embeddings().weight.float()[batch["input_ids"]] * rounded
    torch.testing.assert_close(loaded.get_input_embeddings()(batch["input_ids"]), embedding)
