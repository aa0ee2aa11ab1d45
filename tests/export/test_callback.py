"""`ExportHF` in a run: what it writes when training ends, and when it writes nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightprune.cut import StructuredCut
from lightprune.errors import ConfigError
from lightprune.export import ExportHF
from lightprune.plan import PruningPlan
from lightprune.selectors import RandomSelector
from tests.export.models import files_in, word_tokenizer
from tests.families import tiny_lm
from tests.training import Plain, batches
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


class Untrained(Stranger):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise AssertionError("training began")


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
