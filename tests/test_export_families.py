"""Invariant 3, over all families: the exported directory is the cut model, to `transformers` and nothing else."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lightprune.anatomy import anatomy_of
from lightprune.export import export_hf
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, left_padded, tiny_lm
from tests.surgery.test_model import assert_same, cached_logits, left_out, logits_of

TIED = ("llama_tied", "opt", "gpt2", "gpt2_inverse_scale")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("drop", [[0, 2, 5], [1, 3]], ids=str)
def test_exported_equals_cut(name: str, drop: list[int], tmp_path: Path) -> None:
    lm, batch = tiny_lm(name), left_padded()
    uncut = left_out(lm, name, drop)
    anatomy = anatomy_of(lm)
    plan = PruningPlan.dropping(anatomy, drop)
    count = plan.num_parameters(anatomy)
    cut_model(anatomy, plan)
    export_hf(lm, tmp_path / "out", tokenizer=None, plan=plan)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(lm)
    assert_same(logits_of(loaded, batch), logits_of(lm, batch), 1e-6)
    assert_same(logits_of(loaded, batch), logits_of(uncut, batch))
    assert_same(cached_logits(loaded, batch), logits_of(lm, batch))
    cached, plain = (
        loaded.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == (name in TIED)
    assert sum(p.numel() for p in loaded.parameters()) == count
    assert loaded.config.num_hidden_layers == len(plan.kept_layers)
    # On disk a tied tensor is there once.
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert sum(tensors.get_tensor(key).numel() for key in tensors.keys()) == count  # noqa: SIM118
