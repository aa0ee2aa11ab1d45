"""Text that a model writes: reproducible, resumable, and in the blocks like any other."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightprune import ConfigError
from lightprune.cli import main
from lightprune.data import Source, TextDataModule
from lightprune.data import generated as module
from lightprune.data.generated import Generated, write
from tests.training import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model and its tokenizer; its logits are large, so that it has favourites."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    lm.save_pretrained(folder)
    return folder


def settings_for(model: Path, **others: Any) -> Generated:
    return Generated(**{"model": str(model), "tokens": 300, "length": 24, "batch_size": 4, **others})


def all_of(settings: Generated, folder: Path) -> list[list[int]]:
    return [document.tolist() for document in settings.documents(byte_tokenizer(), folder, "own")]


def greedy(lm: PreTrainedModel, prompt: list[int], length: int, eos: int) -> list[int]:
    """Token by token, without a cache."""
    ids = list(prompt)
    while len(ids) < length:
        with torch.no_grad():
            token = int(lm(torch.tensor([ids])).logits[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
    return ids


def test_the_coldest_sampling_is_the_greedy_one(model: Path) -> None:
    tokenizer, lm = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(model).eval()
    lines = ["a", "to be or not", "the"]
    prompts = model / "prompts.txt"
    prompts.write_text("\n\n".join(lines))
    settings = settings_for(model, temperature=1e-4, prompts=str(prompts), batch_size=3)
    longest = max(len(line) for line in lines)
    for line, document in zip(lines, write(lm, tokenizer, settings, 0, "own"), strict=True):
        ids = tokenizer(line)["input_ids"]
        new = settings.length - longest
        assert document.tolist() == greedy(lm, ids, len(ids) + new, int(tokenizer.eos_token_id))


def test_enough_tokens_and_the_same_each_time(model: Path, tmp_path: Path) -> None:
    first = all_of(settings_for(model), tmp_path / "a")
    assert sum(map(len, first)) >= 300
    assert max(map(len, first)) <= 24
    assert first == all_of(settings_for(model), tmp_path / "b")
    assert first != all_of(settings_for(model, seed=1), tmp_path / "c")


def test_the_random_state_of_the_run_is_left_alone(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    all_of(settings_for(model), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_that_was_killed_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_of(settings_for(model), tmp_path / "whole")
    calls: list[int] = []

    def counted(lm: Any, tokenizer: Any, settings: Any, number: int, domain: str) -> Any:
        calls.append(number)
        if calls.count(2) == 1 and number == 2:
            raise KeyboardInterrupt
        return write(lm, tokenizer, settings, number, domain)

    monkeypatch.setattr(module, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        all_of(settings_for(model), tmp_path / "parts")
    assert all_of(settings_for(model), tmp_path / "parts") == whole
    assert calls[:4] == [0, 1, 2, 2]


def data_of(model: Path, cache: Path, **settings: Any) -> TextDataModule:
    return TextDataModule(
        {"own": {"generated": {"tokens": 600, "length": 40, "batch_size": 4, "model": str(model), **settings}}},
        tokenizer=byte_tokenizer(),
        block_size=16,
        batch_size=2,
        validation=2,
        num_workers=0,
        cache_dir=str(cache),
    )


def test_it_becomes_blocks_like_any_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(model, tmp_path)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 16)
    (entry,) = (tmp_path / "tokens").iterdir()  # what was written batch by batch is gone
    documents = all_of(settings_for(model, tokens=600, length=40), tmp_path / "again")
    tokens = np.load(entry / "tokens.npy")
    assert len(tokens) == sum(map(len, documents)) + len(documents)  # each is closed by EOS

    monkeypatch.setattr(module, "write", lambda *args: pytest.fail("it is in the cache"))
    data_of(model, tmp_path).prepare_data()


def test_other_settings_are_another_text(model: Path) -> None:
    sources = [
        Source.of({"generated": {"model": str(model), **more}}, "own") for more in ({}, {"seed": 1}, {"length": 9})
    ]
    assert len({str(source.identity("own")) for source in sources}) == 3
    assert "generated" not in Source(builtin="python-docs").identity("docs")  # what was cached before stays valid


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"temprature": 1}, "generated is .*temprature.*: it must be a mapping with some of the keys model, tokens"),
        ({"temperature": 0}, "data.domains.own.generated.temperature is 0"),
        ({"tokens": 0}, "data.domains.own.generated.tokens is 0"),
        ({"top_p": 2}, "data.domains.own.generated.top_p is 2"),
        ({"model": 3}, "data.domains.own.generated.model is 3"),
        ("yes", "data.domains.own.generated is 'yes'"),
    ],
)
def test_refused_at_once(value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TextDataModule({"own": {"generated": value}})


def test_without_a_model_it_is_refused(tmp_path: Path) -> None:
    data = data_of(tmp_path, tmp_path)
    data = TextDataModule({"own": {"generated": {}}}, tokenizer=byte_tokenizer(), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"generated\.model is null"):
        data.prepare_data()


def test_prompts_that_are_not_there(model: Path, tmp_path: Path) -> None:
    settings = settings_for(model, prompts=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match=r"generated.prompts is .*none.txt': it must be a text file"):
        all_of(settings, tmp_path / "parts")


def test_the_verb_writes_what_a_fit_finds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the config writes; the fit that follows trains on it, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightprune"])
    settings = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False},
        "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": str(model)}},
        "data": {
            "class_path": "lightprune.data.TextDataModule",
            "init_args": {
                "domains": {"own": {"generated": {"tokens": 300, "length": 40, "batch_size": 4}}},
                "block_size": 16,
                "batch_size": 2,
                "validation": 2,
                "num_workers": 0,
                "cache_dir": "cache",
            },
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["generate", "--config", "config.yaml", "--output", "own.jsonl"]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    assert f"in {len(lines)} documents" in said
    assert {line["domain"] for line in lines} == {"own"}
    assert any(line["text"].strip() for line in lines)

    monkeypatch.setattr(module, "write", lambda *args: pytest.fail("it is in the cache"))
    assert main(["fit", "--config", "config.yaml"]) == 0

    settings["data"]["init_args"]["domains"] = {"plays": {"files": "own.jsonl"}}
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["generate", "--config", "config.yaml"]) == 2
    assert "No domain of data.domains is generated" in capsys.readouterr().err
