"""Models that see and write: their text model is cut, and what brings images to it follows."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3Config,
)

import lightprune as lp
from lightprune import ConfigError
from lightprune.anatomy import anatomy_of, families
from lightprune.anatomy.registry import family_of
from lightprune.integrations.lightning import find_causal_lm
from lightprune.masks.unit_masks import masked
from lightprune.surgery import cut_model
from lightprune.testing import _random_plan, check_family
from tests.families import randomize
from tests.training import Batches, trainer_for

IMAGE = 5  # the token that stands for a piece of an image
# The vision tower is as wide as the text model, as many heads and channels: what is no text must stay all the same.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def llava(text: PretrainedConfig) -> LlavaConfig:
    vision = CLIPVisionConfig(**VISION)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)


def gemma3() -> Gemma3Config:
    layers = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 6}
    text = {**TEXT, **layers, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 6, "eoi_token_index": 7}
    return Gemma3Config(vision_config=vision, text_config=text, **tokens)


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 4, "out_hidden_size": 32}
    tokens = {"image_token_id": IMAGE, "video_token_id": 8, "vision_start_token_id": 6, "vision_end_token_id": 7}
    return Qwen2_5_VLConfig(
        vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16},
        text_config={**TEXT, "rope_parameters": rope},
        **tokens,
    )


CONFIGS: dict[str, PretrainedConfig] = {
    "llava": llava(LlamaConfig(**TEXT)),
    "llava with a Qwen3": llava(Qwen3Config(**TEXT, head_dim=8)),
    "gemma3": gemma3(),
    "qwen2_5_vl": qwen2_5_vl(),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = AutoModelForImageTextToText.from_config(copy.deepcopy(config)).eval()
    randomize(lm, 0)
    return lm


def batch_of(config: PretrainedConfig) -> dict[str, Tensor]:
    """Two sequences, each with an image of four pieces."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(9, 64, (2, 12), generator=generator)
    ids[:, 3:7] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "qwen2_5_vl":
        ids[:, 2] = 6
        pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        return batch | {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    return batch | ({"token_type_ids": (ids == IMAGE).long()} if config.model_type == "gemma3" else {})


def declared(config: PretrainedConfig) -> Any:
    return anatomy_of(model(config)).family


@each
def test_masked_cut_and_exported_agree(config: PretrainedConfig) -> None:
    assert len(check_family(declared(config), copy.deepcopy(config))) >= 3


@each
def test_with_images_masked_and_cut_agree(config: PretrainedConfig) -> None:
    lm, batch = model(config), batch_of(config)
    anatomy = anatomy_of(lm)
    smaller = {"layers": 2, "channels": 40, "hidden": 24}
    if anatomy.family.head_dim_field is None:  # heads of 8 dimensions fill the hidden ones
        smaller |= {"hidden": 16, "heads": 2}
    plan = _random_plan(anatomy, replace(anatomy.shape, **smaller), random.Random(0))
    before = {name: p.shape for name, p in lm.named_parameters()}
    with torch.no_grad(), masked(anatomy, plan):
        expected = lm(**batch).logits
    cut_model(anatomy, plan)
    with torch.no_grad():
        torch.testing.assert_close(lm(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    for name, p in lm.named_parameters():
        if "vision_tower" in name or "visual.blocks" in name:
            assert p.shape == before[name]


class Seeing(L.LightningModule):
    """Somebody's module, which names the text model as the one to prune."""

    pruned_model = "net.model.language_model"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.net = model(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch, labels=batch["input_ids"], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@each
def test_fit_cut_recover_export(config: PretrainedConfig, tmp_path: Path) -> None:
    module, batch = Seeing(config), batch_of(config)
    assert find_causal_lm(module)[1] is module.net
    parts = [
        lp.BlockInfluenceSelector(drop=1, stop=2),
        lp.TaylorUnitSelector(channels=32, stop=2),
        lp.GateAnnealing(),
        lp.DifferencePenalty(strength=0.1),
        lp.StructuredCut(at=4),
        lp.Recovery(lr=1e-3),
        lp.ExportHF(str(tmp_path / "out")),
    ]
    trainer_for(parts, max_steps=6).fit(module, Batches([batch] * 6))
    stated = AutoConfig.from_pretrained(tmp_path / "out")
    assert (stated.text_config.num_hidden_layers, stated.text_config.intermediate_size) == (2, 32)
    assert stated.vision_config.to_dict()["hidden_size"] == 32
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = module.net.eval()(**batch).logits
        torch.testing.assert_close(exported(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    loader = "AutoModelForCausalLM" if config.model_type == "gemma3" else "AutoModelForImageTextToText"
    assert f"`{loader}.from_pretrained` loads it" in (tmp_path / "out" / "README.md").read_text()


def test_a_text_model_that_is_built_otherwise_is_refused_by_name() -> None:
    text = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    with pytest.raises(ConfigError, match="LLaVA with a text model of the type 'opt'"):
        family_of(llava(text))


def test_these_are_families_too() -> None:
    known = {model_type for family in families() for model_type in family.model_types}
    assert {"llava", "gemma3", "qwen2_5_vl"} <= known
