"""Mistakes that transformers only reports, or does not notice at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lightprune.anatomy import anatomy_of
from lightprune.export import export_hf
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import left_padded, tiny_lm
from tests.logits import assert_same, logits_of


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_a_forgotten_number_of_layers(name: str, tmp_path: Path) -> None:
    """The reloaded model has random layers at its end, and transformers a warning."""
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    cut_model(anatomy, PruningPlan.dropping(anatomy, [2, 4]))
    lm.config.num_hidden_layers = 6

    with pytest.raises(RuntimeError, match="missing keys"):
        export_hf(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("drop", [[0], [1], [3], [1, 2, 5], [0, 3, 4]], ids=str)
def test_a_mixture_whose_dense_layers_move(drop: list[int], tmp_path: Path) -> None:
    """Every second layer of this mixture is dense, counted anew once layers are gone, and one more by name."""
    lm, batch = tiny_lm("qwen3_moe").eval(), left_padded()
    anatomy = anatomy_of(lm)
    kinds = [type(layer.mlp).__name__ for layer in lm.model.layers]
    plan = PruningPlan.dropping(anatomy, drop)
    with masked(anatomy, plan):
        expected = logits_of(lm, batch)
    cut_model(anatomy, plan)

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out", plan=plan))

    assert len(set(kinds)) == 2
    assert [type(layer.mlp).__name__ for layer in loaded.model.layers] == [kinds[i] for i in plan.kept_layers]
    assert_same(logits_of(loaded, batch), expected)


def test_a_projection_of_opt_that_would_be_dropped(tmp_path: Path) -> None:
    """With as many hidden as embedding dimensions OPT has no projections, and takes no notice of those on disk."""
    lm, batch = tiny_lm("opt_projected").eval(), left_padded()
    anatomy = anatomy_of(lm)
    assert (anatomy.shape.hidden, lm.config.word_embed_proj_dim) == (32, 16)
    plan = PruningPlan.keeping(anatomy, heads=[range(3)] * 6, hidden=range(24))
    with masked(anatomy, plan):
        expected = logits_of(lm, batch)
    cut_model(anatomy, plan)
    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out", plan=plan))
    assert loaded.config.word_embed_proj_dim == 16
    assert loaded.model.decoder.project_in.weight.shape == (24, 16)
    assert_same(logits_of(loaded, batch), expected)

    lm.config.word_embed_proj_dim = 24  # what a cut to this many would come to
    with pytest.raises(RuntimeError, match="unexpected keys"):
        export_hf(lm, tmp_path / "dropped")


# A part of a name in memory, and what stands in its place on disk.
RENAMED = {
    "gpt_neox": ("lm_head.weight", "embed_out.weight"),
    "mixtral": ("mlp.experts.gate_up_proj", "block_sparse_moe.experts.3.w1.weight"),
    "qwen3_moe": ("mlp.experts.gate_up_proj", "mlp.experts.3.up_proj.weight"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_on_disk_are_not_those_in_memory(name: str, tmp_path: Path) -> None:
    """The directory has the names that the family's checkpoints have, and all of its numbers."""
    lm = tiny_lm(name).eval()
    anatomy = anatomy_of(lm)
    cut_model(anatomy, PruningPlan.dropping(anatomy, [0, 4]))
    in_memory, on_disk = RENAMED[name]
    assert any(in_memory in key for key in lm.state_dict())

    path = export_hf(lm, tmp_path / "out")

    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert any(on_disk in key for key in tensors)
    assert not any(in_memory in key for key in tensors)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in lm.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in lm.state_dict().items())
