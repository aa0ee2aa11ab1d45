"""What is wrong with a directory or a model is found before the directory takes its name."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import lightprune.export.write
from lightprune.anatomy import anatomy_of
from lightprune.errors import ExportError
from lightprune.export import export_hf
from lightprune.export.convert import Outgoing
from lightprune.export.probe import OTHER_STEPS, cached_logits, probe, probe_logits, tolerance
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.export.models import files_in
from tests.families import tiny_lm
from tests.logits import assert_same


def break_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def misshape_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][1:].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(field: str, value: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {field: value}))

    return edit


def damage_what_is_written(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let something happen to the directory between its writing and its verification."""
    verify = lightprune.export.write.verify_export

    def damage_then_verify(path: Path, lm: PreTrainedModel, out: Outgoing) -> None:
        damage(path)
        verify(path, lm, out)

    monkeypatch.setattr(lightprune.export.write, "verify_export", damage_then_verify)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_a_weight, r"1 weights \(such as model.norm.weight\)"),
        (misshape_a_weight, "1 mismatched keys"),
        (edit_config("num_hidden_layers", 5), "16 missing keys"),
        (edit_config("num_hidden_layers", 3), "16 unexpected keys"),
        (edit_config("rms_norm_eps", 0.3), "logits by"),
        (edit_config("tie_word_embeddings", False), "1 missing keys"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_export_is_kept_and_leaves_the_earlier_one(
    damage: Callable[[Path], None], sentence: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        export_hf(tiny_lm("gpt2", num_layers=2), tmp_path / "out")
    before = files_in(tmp_path)
    damage_what_is_written(monkeypatch, damage)
    lm = tiny_lm(num_layers=4)

    with pytest.raises(ExportError, match=sentence) as caught:
        export_hf(lm, tmp_path / "out", overwrite=True)
    after = files_in(tmp_path)
    kept = {name: after[name] for name in after if name.startswith("out-unverified")}
    assert before == {name: after[name] for name in after.keys() - kept.keys()}
    assert "out-unverified/model.safetensors" in kept
    assert "the reloaded model differs: " in (tmp_path / "out-unverified.txt").read_text()
    assert f"kept at '{tmp_path / 'out-unverified'}'" in str(caught.value)
    assert lm.training


def test_a_tie_that_was_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights and equal logits, but training would move them together."""
    lm = tiny_lm("llama", num_layers=2)
    lm.lm_head.weight.data = lm.model.embed_tokens.weight.detach().clone()
    damage_what_is_written(monkeypatch, edit_config("tie_word_embeddings", True))

    with pytest.raises(RuntimeError, match="differs: its embeddings are tied"):
        export_hf(lm, tmp_path / "out")


def test_logits_beside_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in memory that overlooks padding computes the same as the reloaded one on whole sequences only."""
    lm = tiny_lm(num_layers=2)
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda attention_mask, **inputs: forward(**inputs))

    with pytest.raises(RuntimeError, match=r"differs: logits beside padding by \S+ of the largest.*"):
        export_hf(lm, tmp_path / "out")


def forgetful_caches(monkeypatch: pytest.MonkeyPatch, *, which: Callable[[int], bool]) -> None:
    """Caches that lose their first token, which changes nothing but the steps that come after."""

    class Forgetful(DynamicLayer):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(*args, **kwargs)
            if keys.shape[-2] > args[0].shape[-2]:
                keys, values = keys.clone(), values.clone()
                keys[..., 0, :], values[..., 0, :] = 0, 0
            return keys, values

    make, number = DynamicCache.__init__, itertools.count()

    def forgetful(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if which(next(number)):
            for index, layer in enumerate(self.layers):
                assert type(layer) is DynamicLayer
                self.layers[index] = Forgetful()

    monkeypatch.setattr(DynamicCache, "__init__", forgetful)


def test_cached_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reloaded model's, which are computed first, where those in memory are as they should be."""
    forgetful_caches(monkeypatch, which=lambda number: number == 0)
    with pytest.raises(ExportError, match=r"differs: cached logits by \S+ of the largest"):
        export_hf(tiny_lm(num_layers=2), tmp_path / "out")


@pytest.mark.parametrize("which", [lambda number: True, lambda number: number > 0], ids=["both", "memory"])
def test_a_cache_is_no_worse_than_in_memory(
    which: Callable[[int], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model in memory shows too, or alone, is no fault of the export's."""
    forgetful_caches(monkeypatch, which=which)
    assert export_hf(tiny_lm(num_layers=2), tmp_path / "out").is_dir()


def test_the_cached_logits_are_the_logits() -> None:
    """Of a sound model, row by row: the second sequence is padded, and its padding is left out."""
    lm = tiny_lm(num_layers=2).eval()
    batch = probe(lm, padding=4)
    assert batch["attention_mask"].tolist() == [[1] * 16, [0] * 4 + [1] * 12]
    logits = probe_logits(lm, batch)
    assert logits.shape == (28, 64)
    assert_same(cached_logits(lm, batch), logits)
    with torch.no_grad():
        alone = lm(batch["input_ids"][1:, 4:], use_cache=False).logits[0]
    assert_same(logits[16:], alone)


def test_a_model_with_few_positions(tmp_path: Path) -> None:
    export_hf(tiny_lm("gpt2", num_layers=2, n_positions=2), tmp_path / "out")


def test_reduced_precision_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 makes one token's logits differ from many tokens' by more than float32 does."""

    def mixed_settings() -> str:
        raise RuntimeError

    for asked, allowed in ((lambda: "highest", 1e-4), (lambda: "high", 2e-1), (mixed_settings, 2e-1)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", asked)
        assert tolerance(OTHER_STEPS, torch.float32) == allowed
        assert tolerance(OTHER_STEPS, torch.float16) == 5e-2


def test_a_stale_group_size_is_found(tmp_path: Path) -> None:
    """`num_key_value_groups` of a cut attention: right without padding under sdpa, and an error with it."""
    lm = tiny_lm(num_layers=2)
    anatomy = anatomy_of(lm)
    cut_model(anatomy, PruningPlan.keeping(anatomy, heads=[[0, 2], [1, 3]]))
    for layer in lm.model.layers:
        assert layer.self_attn.num_key_value_groups == 1
        layer.self_attn.num_key_value_groups = 2

    with pytest.raises(ExportError, match="RuntimeError: "):
        export_hf(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
