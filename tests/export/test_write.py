"""The directory that an export leaves: what is in it, where it may go, and that the model is as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.export import check_target, export_hf
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from lightprune.surgery.stock_class import check_expressible
from tests.export.models import files_in, without_middle_layers, word_tokenizer
from tests.families import tiny_lm


def test_what_is_written(tmp_path: Path) -> None:
    lm = tiny_lm(num_layers=4)
    lm.config.use_cache = False
    plan = without_middle_layers(lm)

    path = export_hf(lm, tmp_path / "deep" / "out", tokenizer=word_tokenizer(), plan=plan)

    assert path == tmp_path / "deep" / "out"
    assert [p.name for p in path.parent.iterdir()] == ["out"]
    assert PruningPlan.load(path / "pruning_plan.json") == plan
    assert AutoTokenizer.from_pretrained(path)("w7 w8")["input_ids"] == [7, 8]
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config.num_hidden_layers == 2
    assert loaded.config.use_cache


def test_generation_settings_that_have_no_effect(tmp_path: Path) -> None:
    """Models of the hub come with a temperature and without sampling, which `transformers` loads and will not save."""
    lm = tiny_lm(num_layers=4)
    lm.generation_config.update(do_sample=False, temperature=0.6, top_p=0.9, pad_token_id=-1, max_new_tokens=7)
    given = lm.generation_config

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out")).generation_config

    assert (loaded.temperature, loaded.top_p, loaded.pad_token_id, loaded.max_new_tokens) == (None, None, None, 7)
    assert lm.generation_config is given
    assert given.temperature == 0.6


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: Any, trained: torch.dtype, tmp_path: Path) -> None:
    lm = tiny_lm(num_layers=4).to(trained)

    path = export_hf(lm, tmp_path / "out", dtype=dtype)

    expected = trained if dtype is None else getattr(torch, dtype)
    assert json.loads((path / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    reloaded = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in reloaded.parameters()} == {expected}
    for name, weight in lm.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], weight.to(expected))


@pytest.mark.parametrize("convert", [False, True], ids=["llama", "as another class"])
def test_every_weight_keeps_its_dtype(convert: bool, tmp_path: Path) -> None:
    """A head in full precision, as others train it: the file has all its digits, and loading says which it takes."""
    lm = tiny_lm("llama", num_layers=3).to(torch.bfloat16)
    lm.lm_head.float().weight.data += 1e-5
    if convert:  # 27 hidden dimensions, which two heads do not divide
        cut_model(anatomy_of(lm), PruningPlan.keeping(anatomy_of(lm), heads=[[0, 2]] * 3, hidden=range(27)))

    with pytest.warns(UserWarning, match=r"1 of the weights \(such as `lm_head.weight`, torch.float32\)"):
        path = export_hf(lm, tmp_path / "out")

    stored = load_file(path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: p.dtype for n, p in lm.named_parameters()}
    assert torch.equal(stored["lm_head.weight"], lm.lm_head.weight)
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert "load with `dtype=torch.float32` to have them exactly" in (path / "README.md").read_text()
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert all(torch.equal(weight, exact.get_parameter(name)) for name, weight in lm.float().named_parameters())
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").lm_head.weight.dtype == torch.bfloat16


def test_most_weights_decide_what_a_model_is_loaded_in(tmp_path: Path) -> None:
    lm = tiny_lm("llama", num_layers=3).to(torch.bfloat16)
    lm.model.embed_tokens.float()  # the first of all, by which `transformers` would go
    path = export_hf(lm, tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


def test_training_goes_on_with_the_same_model(tmp_path: Path) -> None:
    lm = tiny_lm(num_layers=4)
    lm.config.use_cache = False
    lm.model.layers[0].eval()
    parameters = dict(lm.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    modes = [module.training for module in lm.modules()]
    config = lm.config.to_dict()
    optimizer = torch.optim.AdamW(lm.parameters())

    export_hf(lm, tmp_path / "out", dtype="bfloat16")

    assert [module.training for module in lm.modules()] == modes
    assert lm.config.to_dict() == config
    for name, parameter in lm.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, weights[name])
    lm(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    assert not torch.equal(lm.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_tie_counts_not_what_the_config_says_of_it(tied: bool, tmp_path: Path) -> None:
    lm = tiny_lm(num_layers=2, tie_word_embeddings=not tied)
    embedding = lm.model.embed_tokens.weight
    lm.lm_head.weight = embedding if tied else torch.nn.Parameter(embedding.detach() + 1)
    check_expressible(anatomy_of(lm), PruningPlan.dropping(anatomy_of(lm), [1]))

    loaded = AutoModelForCausalLM.from_pretrained(export_hf(lm, tmp_path / "out"))

    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, lm.lm_head.weight)
    assert lm.config.tie_word_embeddings == (not tied)


def test_a_model_that_no_class_can_hold(tmp_path: Path) -> None:
    lm = tiny_lm("gemma2", num_layers=2)
    anatomy = anatomy_of(lm)
    unchecked = replace(anatomy, family=replace(anatomy.family, predicates=()))
    cut_model(unchecked, PruningPlan.keeping(unchecked, hidden=range(30)))

    with pytest.raises(ConfigError, match=r"Gemma2Config refuses it \(The hidden size \(30\) is not a multiple"):
        export_hf(lm, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["export", "empty directory", "file", "other directory"])
def test_what_exists_is_not_overwritten_unasked(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "export":
        export_hf(tiny_lm("gpt2", num_layers=2), target)
    elif kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "other directory":
            (target / "precious.txt").write_text("precious")
    before = files_in(tmp_path)

    with pytest.raises(ConfigError, match=r"exists already.*`overwrite: true`"):
        export_hf(tiny_lm(num_layers=2), target)
    assert files_in(tmp_path) == before
    if kind != "export":
        with pytest.raises(ConfigError, match="is no export of lightprune"):
            export_hf(tiny_lm(num_layers=2), target, overwrite=True)
        assert files_in(tmp_path) == before


def test_overwrite_replaces_an_earlier_export(tmp_path: Path) -> None:
    export_hf(tiny_lm("gpt2", num_layers=2), tmp_path / "out", plan=None)
    (tmp_path / "out" / "merges.txt").write_text("")

    export_hf(tiny_lm(num_layers=2), tmp_path / "out", overwrite=True)

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("others", ["notes.txt", "checkpoints/last.ckpt"])
def test_overwrite_takes_nothing_else_away(others: str, tmp_path: Path) -> None:
    target = export_hf(tiny_lm("gpt2", num_layers=2), tmp_path / "out", plan=None)
    (target / others).parent.mkdir(exist_ok=True)
    (target / others).write_text("precious")
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match=f"holds '{Path(others).parts[0]}' beside an earlier export"):
        export_hf(tiny_lm(num_layers=2), target, overwrite=True)
    assert files_in(tmp_path) == before


def test_overwrite_takes_no_other_model_away(tmp_path: Path) -> None:
    tiny_lm("gpt2", num_layers=2).save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match="is no export of lightprune"):
        export_hf(tiny_lm(num_layers=2), tmp_path / "source", overwrite=True)


@pytest.mark.parametrize("path", ["", "/", "~nobody-of-that-name/x", "file/below", "dangling"])
def test_a_place_where_nothing_can_be(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="The output"):
        check_target(tmp_path / path if path[:1].isalpha() else path, overwrite=False)
