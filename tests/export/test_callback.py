"""`ExportHF` in a run: what it writes when training ends, and when it writes nothing."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightprune.callbacks.run_report import RunReport
from lightprune.cli import PruningTrainer
from lightprune.cut import StructuredCut
from lightprune.errors import ConfigError, ExportError
from lightprune.export import ExportHF, tokenizer_of
from lightprune.plan import PruningPlan
from lightprune.selectors import RandomSelector
from tests.export.models import files_in, word_tokenizer
from tests.families import tiny_lm
from tests.training import Plain, batches, trainer_for
from tests.training import fit as fit_plain


class Stranger(L.LightningModule):
    """A module that knows nothing of lightprune."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        self.net = torch.nn.ModuleDict({"inner": tiny_lm(num_layers=4)})
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


@pytest.mark.parametrize("tokenizer", [None, word_tokenizer(), "a name"])
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


class LateLogger(DummyLogger):
    """Makes its directory when it first logs, as TensorBoard's does."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    @property
    def save_dir(self) -> str:
        return str(self.directory)


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "logs"])
@pytest.mark.parametrize("above", [False, True])
def test_callback_refuses_a_directory_that_the_run_makes(above: bool, where: str, tmp_path: Path) -> None:
    path = (tmp_path / where).parent if above and where == "run/checkpoints" else tmp_path / where
    with pytest.raises(ConfigError, match=f"ExportHF.path is '{path}', where .* lies: choose another `path`"):
        L.Trainer(
            accelerator="cpu",
            max_steps=1,
            default_root_dir=tmp_path / "run",
            callbacks=[ExportHF(str(path)), ModelCheckpoint(tmp_path / "run" / "checkpoints")],
            logger=LateLogger(tmp_path / "logs"),
        ).fit(Stranger(), batches(2))
    assert not list(tmp_path.rglob("config.json"))


class Begun(Exception):
    pass


class Untrained(Stranger):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise Begun


def test_what_could_not_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    grown, contradictory = Untrained(), Untrained()
    grown.net["inner"].register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(ConfigError, match=r"1 parameters would not be those of a stock LlamaForCausalLM .*scale: \[\]"):
        fit(grown, ExportHF(str(tmp_path / "out")), tmp_path)
    contradictory.net["inner"].generation_config.num_return_sequences = 2
    with pytest.raises(ConfigError, match=r"generation_config cannot be saved \(.*num_return_sequences.*\): correct"):
        fit(contradictory, ExportHF(str(tmp_path / "out")), tmp_path)
    assert files_in(tmp_path) == {}


class Adapted(Stranger):
    """With adapters, which it merges after the last batch."""

    def __init__(self) -> None:
        super().__init__()
        get_peft_model(self.net["inner"], LoraConfig(target_modules=["q_proj"]))

    def on_train_epoch_end(self) -> None:
        for layer in self.net["inner"].model.layers:
            layer.self_attn.q_proj.merge()
            layer.self_attn.q_proj = layer.self_attn.q_proj.base_layer


def test_adapters_may_still_be_merged(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has adapters: unless they are merged by then, it cannot be exported"):
        fit(Adapted(), ExportHF(str(tmp_path / "out")), tmp_path)
    assert (tmp_path / "out" / "config.json").exists()


class Broken(Stranger):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise ArithmeticError


def test_callback_exports_nothing_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        fit(Broken(), ExportHF(str(tmp_path / "out")), tmp_path)
    assert files_in(tmp_path) == {}


def test_the_plan_and_the_card_are_those_of_all_cuts(tmp_path: Path) -> None:
    module, data = Plain(tiny_lm(num_layers=5)), batches(3)
    before = module.lm.num_parameters()
    callbacks = [
        RandomSelector(drop=2, seed=1),
        StructuredCut(at=1),
        RandomSelector(drop=1, seed=2, start=2),
        StructuredCut(at=2),
        ExportHF(str(tmp_path / "out")),
    ]
    fit_plain(module, callbacks, data, max_steps=3)

    plan = PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert (plan.source.layers, plan.shape.layers) == (5, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| layers | 5 | 2 |",
        f"| parameters | {before:,} | {module.lm.num_parameters():,} |",
        "|  | before cut 1 | after cut 1 | before cut 2 | after cut 2 | last validation |",
        "| seed | 1 |",
        "| seed | 2 |",
    ):
        assert line in card, card


class StopEarly(Callback):
    """Ends a run after its first step."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = True


def test_callback_exports_nothing_when_the_cut_did_not_happen(tmp_path: Path) -> None:
    export = ExportHF(str(tmp_path / "out"))
    callbacks = [StopEarly(), RandomSelector(drop=1), StructuredCut(at=3), export]

    with pytest.warns(UserWarning, match="Nothing is exported to .*ended before the cut"):
        fit_plain(Plain(tiny_lm(num_layers=3)), callbacks, batches(3), max_steps=3)
    assert files_in(tmp_path) == {}


class Holder:
    """A processor, or somebody's wrapper."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.mark.parametrize("name", ["tokenizer", "processing_class", "processor"])
@pytest.mark.parametrize("wrap", [lambda t: t, Holder], ids=["itself", "wrapped"])
@pytest.mark.parametrize("owner", ["module", "data"])
def test_where_a_tokenizer_is_found(owner: str, wrap: Any, name: str) -> None:
    tokenizer, module, data = word_tokenizer(), L.LightningModule(), L.LightningDataModule()
    setattr(module if owner == "module" else data, name, wrap(tokenizer))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert tokenizer_of(trainer, module, data) is tokenizer
    trainer.datamodule = data
    assert tokenizer_of(trainer, module) is tokenizer


@pytest.mark.parametrize("given", ["itself", "directory"])
def test_a_tokenizer_that_is_named(given: str, tmp_path: Path) -> None:
    tokenizer: Any = word_tokenizer()
    if given == "directory":
        tokenizer.save_pretrained(tmp_path / "words")
        tokenizer = str(tmp_path / "words")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No tokenizer was found")
        fit(Stranger(), ExportHF(str(tmp_path / "out"), tokenizer=tokenizer), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7")["input_ids"] == [7]


def test_no_tokenizer_is_worth_one_warning_before_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No tokenizer was found, .* set ExportHF.tokenizer to"), pytest.raises(Begun):
        fit(Untrained(), ExportHF(str(tmp_path / "out")), tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [("nowhere/at/all", "There is no file or directory 'nowhere/at/all'"), (7, "ExportHF.tokenizer is of type int")],
)
def test_a_tokenizer_that_is_none_is_refused_before_training(tokenizer: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fit(Untrained(), ExportHF(str(tmp_path / "out"), tokenizer=tokenizer), tmp_path)


@pytest.mark.parametrize("path", ["s3://bucket/out", "file:///tmp/out", "hf://me/model", "gs:/bucket"])
def test_a_url_is_refused_before_training(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"'{path}', a URL: name a local directory in `path`"):
        fit(Untrained(), ExportHF(path), tmp_path)
    assert files_in(tmp_path) == {}


class Registers(Stranger):
    """Grows a buffer that no stock class has after the last batch, as a late change of heart."""

    def on_train_epoch_end(self) -> None:
        self.net["inner"].register_buffer("late", torch.zeros(1))


class Breaks(Stranger):
    def on_train_epoch_end(self) -> None:
        self.net["inner"].model.norm.weight.data.fill_(torch.nan)


class Unsaveable(Stranger):
    def on_train_epoch_end(self) -> None:
        self.net["inner"].generation_config.num_return_sequences = 2


@pytest.mark.parametrize(
    ("module", "sentence", "weights"),
    [
        (Registers, "reloaded model differs: 1 unexpected keys", "model.safetensors"),
        (
            Breaks,
            r"training has broken the model: 1 of \d+ weights .*not finite .*model.norm.weight",
            "model.safetensors",
        ),
        (Unsaveable, "num_return_sequences", "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("export_first", [True, False])
def test_what_fails_at_the_end_is_kept_and_everybody_finishes(
    module: type[Stranger], sentence: str, weights: str, export_first: bool, tmp_path: Path
) -> None:
    """Above all the checkpoint and the report; then the fit ends with the one sentence."""
    callbacks: list[Callback] = [
        RunReport(validate_at_start=False),
        ModelCheckpoint(tmp_path / "checkpoints", save_last=True, every_n_epochs=1, save_on_train_epoch_end=True),
        Farewell(),
    ]
    export = ExportHF(str(tmp_path / "out"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[export, *callbacks] if export_first else [*callbacks, export],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path / "run",
    )
    stranger = module()
    with pytest.raises(ExportError, match=f"not exported to .*out': .*{sentence}.*kept at .*out-unverified'") as caught:
        trainer.fit(stranger, DataLoader(torch.arange(16).view(2, 1, 8), batch_size=None))  # type: ignore[arg-type]

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out-unverified" / weights).is_file()
    assert (tmp_path / "out-unverified.txt").read_text().startswith("This model was not exported to")
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert Farewell.said == ["on_train_end", "on_fit_end", "teardown"]
    assert "teardown" not in vars(stranger)


class Farewell(Callback):
    """Notes the hooks in which callbacks finish their work."""

    said: ClassVar[list[str]] = []

    def on_train_end(self, *args: Any) -> None:
        self.said[:] = ["on_train_end"]

    def on_fit_end(self, *args: Any) -> None:
        self.said.append("on_fit_end")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.said.append("teardown")


def test_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    """By another run, say: the model goes beside it."""

    class Takes(Stranger):
        def on_train_epoch_end(self) -> None:
            (tmp_path / "out").mkdir()

    with pytest.warns(UserWarning, match="exists already.* the model goes to .*out-2'"):
        fit(Takes(), ExportHF(str(tmp_path / "out")), tmp_path)
    assert not any((tmp_path / "out").iterdir())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out-2").config.num_hidden_layers == 4


@pytest.mark.parametrize("with_cut", [False, True])
def test_a_mixture_that_trains_on_its_router_logits(with_cut: bool, tmp_path: Path) -> None:
    module = Plain(tiny_lm("mixtral", num_layers=3, output_router_logits=True))
    parts = [RandomSelector(drop=1), StructuredCut(at=1)] if with_cut else []
    fit_plain(module, [*parts, ExportHF(str(tmp_path / "out"))], batches(2), max_steps=2)

    assert module.lm.config.output_router_logits
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12).view(2, 6) + 3
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    assert reloaded.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape[0] == 2
    assert (
        "trained with `output_router_logits`, which the config leaves out" in (tmp_path / "out/README.md").read_text()
    )


class Counter(Untrained):
    def __init__(self) -> None:
        super().__init__()
        self.net["inner"].register_buffer("tokens_seen", torch.zeros(1))


class Hooked(Untrained):
    def __init__(self) -> None:
        super().__init__()
        self.net["inner"].lm_head.register_forward_hook(lambda module, inputs, output: output / 2)


@pytest.mark.parametrize("with_cut", [False, True])
@pytest.mark.parametrize(("module", "sentence"), [(Counter, "tokens_seen, a buffer"), (Hooked, "something else")])
def test_what_no_stock_class_holds_is_refused_before_training(
    module: type[Stranger], sentence: str, with_cut: bool, tmp_path: Path
) -> None:
    parts = [RandomSelector(drop=1), StructuredCut(at=1)] if with_cut else []
    with pytest.raises(ConfigError, match=sentence):
        fit_plain(module(), [*parts, ExportHF(str(tmp_path / "out"))], batches(2), max_steps=2)


def test_a_cut_alone_cares_for_no_stock_class(tmp_path: Path) -> None:
    """Nothing is exported: what is hooked or counted is the module's own affair."""
    lm = tiny_lm(num_layers=3)
    lm.register_buffer("tokens_seen", torch.zeros(1))
    fit_plain(Plain(lm), [RandomSelector(drop=1), StructuredCut(at=1)], batches(2), max_steps=2)
    assert lm.config.num_hidden_layers == 2


@pytest.mark.parametrize("buffer", [False, True])
def test_the_verb_exports_a_checkpoint_of_such_a_mixture(buffer: bool, tmp_path: Path) -> None:
    """And refuses, in the same sentence, what no stock class holds."""

    def module() -> Plain:
        lm = tiny_lm("mixtral", num_layers=3, output_router_logits=True)
        if buffer:
            lm.register_buffer("tokens_seen", torch.zeros(1))
        return Plain(lm)

    def parts() -> list[Callback]:
        return [RandomSelector(drop=1), StructuredCut(at=1)]

    saver = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=2)
    fit_plain(module(), [*parts(), saver], batches(2), max_steps=2, enable_checkpointing=True)
    trainer = PruningTrainer(callbacks=parts(), accelerator="cpu", devices=1, logger=False, max_steps=2)
    if buffer:
        with pytest.raises(ConfigError, match=r"tokens_seen, a buffer.*or take the weights from the checkpoint itself"):
            trainer.export(module(), str(tmp_path / "end.ckpt"), str(tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))
    else:
        with pytest.warns(UserWarning, match="No tokenizer was found, .* set tokenizer to"):
            trainer.export(module(), str(tmp_path / "end.ckpt"), str(tmp_path / "out"))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_a_resume_that_finds_nothing_to_train_fails_as_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, saver = batches(2), ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=2)
    fit_plain(Plain(tiny_lm(num_layers=2)), [saver], data, max_steps=2, enable_checkpointing=True)

    def differs(*args: Any) -> None:
        raise ExportError("the reloaded model differs: everything")

    monkeypatch.setattr("lightprune.export.write.verify_export", differs)
    trainer = trainer_for([ExportHF(str(tmp_path / "out"))], max_steps=2)
    with pytest.raises(ExportError, match=r"differs: everything; .*out-unverified"):
        trainer.fit(Plain(tiny_lm(num_layers=2)), data, data, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert (tmp_path / "out-unverified" / "model.safetensors").is_file()
