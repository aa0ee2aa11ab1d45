"""Exported directories, as a program without lightprune sees them."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lightprune.export
from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.export import ExportHF, export_hf, model_card
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model

VOCAB = 32


def make_llama(tied: bool = True) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "llama-untied": lambda: make_llama(tied=False),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, n_positions=32)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
        )
    ),
}


def make_model(name: str = "llama") -> PreTrainedModel:
    """A model whose every parameter is random, so that each one matters."""
    torch.manual_seed(0)
    lm = MODELS[name]()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return lm.train()


def cut(lm: PreTrainedModel) -> PruningPlan:
    anatomy = anatomy_of(lm)
    plan = PruningPlan.dropping(anatomy, [1, 2], selector="by hand", scores=[[0.5, 0.1]])
    cut_model(anatomy, plan)
    return plan


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def logits_of(lm: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    modes = [module.training for module in lm.modules()]
    with torch.no_grad():
        logits: torch.Tensor = lm.eval()(torch.tensor([tokens])).logits
    for module, mode in zip(lm.modules(), modes, strict=True):
        module.training = mode
    return logits


STRANGER = """
import json, sys
sys.modules["lightprune"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM

tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0)
seen = {}
for path in sys.argv[1:]:
    lm, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    cached, uncached = (lm.generate(tokens, use_cache=cache, **options).tolist() for cache in (True, False))
    with torch.no_grad():
        logits = lm(tokens).logits.tolist()
    seen[path] = dict(
        report=[key for keys in report.values() for key in keys],
        logits=logits,
        tied=lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
        layers=lm.config.num_hidden_layers,
        use_cache=lm.config.use_cache,
        same_generation=cached == uncached,
    )
print(json.dumps(seen))
"""


def seen_by_a_stranger(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a fresh, isolated Python that cannot import lightprune makes of directories, by their names."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {Path(path).name: seen for path, seen in json.loads(done.stdout.splitlines()[-1]).items()}


def test_a_stranger_loads_the_same_model(tmp_path: Path) -> None:
    models, plans = {name: make_model(name) for name in MODELS}, {}
    for name, lm in models.items():
        lm.config.use_cache = False
        plans[name] = cut(lm)
        export_hf(lm, tmp_path / name, plan=plans[name])

    for name, seen in seen_by_a_stranger(tmp_path / name for name in MODELS).items():
        assert seen["report"] == []
        assert torch.equal(torch.tensor(seen["logits"]), logits_of(models[name], [3, 1, 4, 1, 5, 9, 2, 6]))
        assert seen["tied"] == (name != "llama-untied")
        assert seen["layers"] == 2
        assert seen["use_cache"]
        assert seen["same_generation"]
        assert PruningPlan.load(tmp_path / name / "pruning_plan.json") == plans[name]


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: Any, trained: torch.dtype, tmp_path: Path) -> None:
    lm = make_model().to(trained)

    path = export_hf(lm, tmp_path / "out", dtype=dtype)

    expected = trained if dtype is None else getattr(torch, dtype)
    assert json.loads((path / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    reloaded = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in reloaded.parameters()} == {expected}
    for name, weight in lm.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], weight.to(expected))


def test_the_model_in_memory_is_left_as_it_was(tmp_path: Path) -> None:
    lm = make_model()
    lm.config.use_cache = False
    lm.model.layers[0].eval()
    parameters = dict(lm.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    modes = [module.training for module in lm.modules()]
    optimizer = torch.optim.AdamW(lm.parameters())

    export_hf(lm, tmp_path / "out", dtype="bfloat16")

    assert [module.training for module in lm.modules()] == modes
    assert not lm.config.use_cache
    assert lm.config.dtype in (None, torch.float32)
    for name, parameter in lm.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, weights[name])
    lm(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    assert not torch.equal(lm.lm_head.weight, weights["model.embed_tokens.weight"])


def test_tokenizer_and_model_card(tmp_path: Path) -> None:
    lm = make_model()
    before = lm.num_parameters()
    plan = cut(lm)

    path = export_hf(
        lm,
        tmp_path / "out",
        tokenizer=make_tokenizer(),
        plan=plan,
        card={
            "parameters": {"before": before, "after": lm.num_parameters()},
            "data": {"domains": "code, web"},
            "metrics": {"before the cut": {"val/ppl": 31.25}, "last validation": {"val/ppl": 33.5, "val/loss": 3.5}},
        },
    )

    assert AutoTokenizer.from_pretrained(path)("w7 w8")["input_ids"] == [7, 8]
    card = (path / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    assert "library_name: transformers" in front.splitlines()
    assert "- pruned" in front.splitlines()
    assert "base_model" not in front
    for line in (
        "| layers | 4 | 2 |",
        f"| parameters | {before:,} | {lm.num_parameters():,} |",
        "Layers 1, 2, counted from 0.",
        "| selector | by hand |",
        "| domains | code, web |",
        "|  | before the cut | last validation |",
        "| val/ppl | 31.25 | 33.5 |",
        "| val/loss |  | 3.5 |",
        f"| torch | {torch.__version__} |",
        f"| lightprune | {lightprune.__version__} |",
    ):
        assert line in body, card


def test_model_card_names_a_base_model_from_the_hub() -> None:
    lm = make_model()
    lm.name_or_path = "org/name"

    assert "\nbase_model: org/name\n" in model_card(lm, None, {})


@pytest.mark.parametrize("kind", ["export", "empty directory", "file", "other directory"])
def test_what_exists_is_not_overwritten_unasked(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "export":
        export_hf(make_model("gpt2"), target)
    elif kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "other directory":
            (target / "precious.txt").write_text("precious")
    before = snapshot(tmp_path)

    with pytest.raises(ConfigError, match=r"exists already.*`overwrite: true`"):
        export_hf(make_model(), target)
    assert snapshot(tmp_path) == before
    if kind != "export":
        with pytest.raises(ConfigError, match="is no Hugging Face model"):
            export_hf(make_model(), target, overwrite=True)
        assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_overwrite_replaces_an_earlier_export(tmp_path: Path) -> None:
    export_hf(make_model("gpt2"), tmp_path / "out", plan=None)
    (tmp_path / "out" / "left over").write_text("")

    export_hf(make_model(), tmp_path / "out", overwrite=True)

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    assert not (tmp_path / "out" / "left over").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def break_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(field: str, value: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {field: value}))

    return edit


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_a_weight, r"1 weights \(such as model.norm.weight\)"),
        (edit_config("num_hidden_layers", 5), "9 missing keys"),
        (edit_config("num_hidden_layers", 3), "9 unexpected keys"),
        (edit_config("rms_norm_eps", 0.3), "logits by"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_export_leaves_nothing_behind(
    damage: Callable[[Path], None], sentence: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        export_hf(make_model("gpt2"), tmp_path / "out")
    before = snapshot(tmp_path)
    verify = lightprune.export.verify_export

    def damage_then_verify(path: Path, lm: PreTrainedModel) -> None:
        damage(path)
        verify(path, lm)

    monkeypatch.setattr(lightprune.export, "verify_export", damage_then_verify)
    lm = make_model()

    with pytest.raises(RuntimeError, match=sentence):
        export_hf(lm, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == before
    assert lm.training


class Stranger(L.LightningModule):
    """A module that knows nothing of lightprune."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        self.net = torch.nn.ModuleDict({"inner": make_model()})
        self.tokenizer = tokenizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net["inner"](batch, labels=batch).loss
        self.log("my_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, callback: ExportHF, folder: Path) -> None:
    batches = torch.arange(16).view(2, 1, 8)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", [None, make_tokenizer(), "a name"])
def test_callback_exports_what_a_stranger_trained(tokenizer: Any, tmp_path: Path) -> None:
    module = Stranger(tokenizer)
    fit(module, ExportHF(str(tmp_path / "deep" / "out")), tmp_path)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    for name, weight in module.net["inner"].state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], weight)
    assert (tmp_path / "deep/out/tokenizer.json").exists() == isinstance(tokenizer, PreTrainedTokenizerFast)
    card = (tmp_path / "deep/out/README.md").read_text()
    assert "## Metrics" not in card  # nothing was validated
    assert "| optimizer steps | 2 |" in card


class Validated(Stranger):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("my_score", float(self.global_step))

    def val_dataloader(self) -> Any:
        return DataLoader(torch.arange(8).view(1, 1, 8), batch_size=None)  # type: ignore[arg-type]


def test_the_card_tells_the_last_validation_and_nothing_of_training(tmp_path: Path) -> None:
    fit(Validated(), ExportHF(str(tmp_path / "out")), tmp_path)

    card = (tmp_path / "out" / "README.md").read_text()
    assert "|  | last validation |\n| --- | --- |\n| my_score | 2 |" in card
    assert "my_loss" not in card


def test_callback_refuses_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    module = Stranger()
    before = module.net["inner"].lm_head.weight.detach().clone()

    with pytest.raises(ConfigError, match="exists already"):
        fit(module, ExportHF(str(tmp_path / "out")), tmp_path)
    with pytest.raises(ConfigError, match="dtype 'int4' is unknown"):
        fit(module, ExportHF(str(tmp_path / "new"), dtype="int4"), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(module.net["inner"].lm_head.weight, before)


class Broken(Stranger):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise ArithmeticError


def test_callback_exports_nothing_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        fit(Broken(), ExportHF(str(tmp_path / "out")), tmp_path)
    assert snapshot(tmp_path) == {}


class UncutPipeline:
    """Stands in for a pipeline whose run ended before its cut."""

    plan = None

    class cut:
        done = False


def test_callback_exports_nothing_when_the_cut_did_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightprune.export.Pipeline, "of", lambda trainer: UncutPipeline)

    with pytest.warns(UserWarning, match="Nothing is exported to .*ended before the cut"):
        fit(Stranger(), ExportHF(str(tmp_path / "out")), tmp_path)
    assert snapshot(tmp_path) == {}
