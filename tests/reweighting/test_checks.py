"""Every bad input ends the run before the first step, in one sentence that names the key."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightprune.errors import ConfigError
from lightprune.reweighting import DomainReweighting
from tests.reweighting.runs import DOMAINS, Stranger, fit, text_data, write_texts
from tests.training import Spy

NOTHING = dict.fromkeys(DOMAINS, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def refused(folder: Path, message: str, options: dict[str, Any], **kwargs: Any) -> None:
    steps = Spy(lambda trainer, module: trainer.global_step, "on_before_optimizer_step")
    with pytest.raises(ConfigError, match=message) as error:
        fit(folder, [DomainReweighting(**options), steps], module=kwargs.pop("module", Stranger()), **kwargs)
    assert steps.seen == []
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "dro"}, "rule is 'dro'.*robust, sheared, constant"),
        ({"losses": "test"}, "losses is 'test'.*training, validation"),
        ({"reference": "median"}, "reference is 'median'.*source, dynamic or a mapping"),
        ({"radius": 0.0}, "radius is 0.0.*above 0"),
        ({"radius": -1}, "radius is -1.*above 0"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"radius": "x"}, "radius is 'x'.*a finite number, above 0"),
        ({"every": None}, "every is None.*a whole number, at least 1"),
        ({"start": 0.5}, "start is 0.5.*a whole number"),
        ({"stop": "5"}, "stop is '5'.*a whole number of optimizer steps, or a share of the run"),
        ({"floor": 1.0}, "floor is 1.0.*below 1"),
        ({"floor": -0.1}, "floor is -0.1.*at least 0"),
        ({"every": 0}, "every is 0.*at least 1"),
        ({"start": -1}, "start is -1.*at least 0"),
        ({"start": 5, "stop": 5}, "stop is 5.*above start=5"),
        ({"start": 12}, "start is 12.*ends at step 12"),
        ({"rule": "sheared", "dynamic_ratio": True}, "dynamic_ratio.*rule is 'sheared'"),
        ({"reference": {**NOTHING, "web": 1.0}}, "reference names 'web'.*easy, hard, middle"),
        ({"reference": {"easy": 1.0, "hard": 2.0}}, "no loss for 'middle'"),
        ({"reference": {**NOTHING, "hard": float("nan")}}, "reference.hard is nan"),
        ({"reference": {**NOTHING, "hard": -1.0}}, "reference.hard is -1.0"),
        ({"reference": {**NOTHING, "hard": "low"}}, "reference.hard is low"),
        ({"reference": "dynamic", "every": 2}, "dynamic.*12 steps have too few with every=2"),
    ],
)
def test_settings(folder: Path, options: dict[str, Any], message: str) -> None:
    refused(folder, f"DomainReweighting.*{message}", options)


def test_what_the_shortest_run_with_a_dynamic_reference_is_told_works(folder: Path) -> None:
    refused(folder, "at most 2, better 1", {"reference": "dynamic", "every": 3}, max_steps=26, limit_val_batches=0)
    fit(folder, [DomainReweighting(reference="dynamic", every=2)], 26, Stranger(), limit_val_batches=0)


@pytest.mark.parametrize(
    "options", [{"reference": "dynamic", "every": 1}, {"reference": NOTHING, "dynamic_ratio": True}]
)
def test_shares_of_an_endless_run(folder: Path, options: dict[str, Any]) -> None:
    refused(folder, "length is not known.*max_steps", options, max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, "reference='source'"), ({"losses": "validation", "reference": NOTHING}, "losses=")]
)
def test_no_validation(folder: Path, options: dict[str, Any], wanted: str) -> None:
    refused(folder, f"{wanted}.*needs validation", options, limit_val_batches=0)

    class Silent(Stranger):
        validation_step = L.LightningModule.validation_step

    refused(folder, f"{wanted}.*needs validation", options, module=Silent())


def test_a_domain_without_validation_data(folder: Path) -> None:
    refused(
        folder,
        "hard, middle got none.*limit_val_batches",
        {},
        limit_val_batches=1,
        data=text_data(folder, batch_size=2),
    )


@pytest.mark.parametrize(
    ("options", "run", "said"),
    [
        ({}, {}, "every is 50, and from its start it has 12 steps"),
        ({"every": 4, "stop": 4}, {}, "every is 4, and from its start it has 3 steps"),
        ({"losses": "validation"}, {"val_check_interval": 1000, "check_val_every_n_epoch": None}, "is 1000, beyond"),
    ],
)
def test_no_update_to_come_is_said(folder: Path, options: dict[str, Any], run: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        fit(folder, [DomainReweighting(**options)], **run)


def test_a_single_domain(folder: Path) -> None:
    data = text_data(folder, weights={"easy": 1, "hard": 0, "middle": 0})
    refused(folder, "two domains with a weight above 0.*data.weights", {}, data=data)


def test_a_data_module_without_domains(folder: Path) -> None:
    class Other(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return text_data(folder).train_dataloader()

        val_dataloader = train_dataloader

    refused(folder, "Other has no `domain_names`", {}, data=Other())
    steps = Spy(lambda trainer, module: trainer.global_step, "on_before_optimizer_step")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[DomainReweighting(), steps], logger=False, enable_checkpointing=False
    )
    data = text_data(folder)
    data.setup("fit")
    with pytest.raises(ConfigError, match="there is none: fit with datamodule="):
        trainer.fit(Stranger(), data.train_dataloader())
    assert steps.seen == []


def test_weights_of_other_domains(folder: Path) -> None:
    data = text_data(folder)
    data.domain_names = ["easy", "hard"]
    refused(folder, "`weights` are .*middle.*`domain_names`: easy, hard", {}, data=data)


def test_batches_without_a_domain(folder: Path) -> None:
    class Stripped(Stranger):
        def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            return {name: value for name, value in batch.items() if name != "domain"}

    refused(folder, "batch without `domain`", {"reference": NOTHING}, module=Stripped())


def test_a_module_whose_losses_cannot_be_seen(folder: Path) -> None:
    class Hidden(Stranger):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            found: Tensor = self.inner["net"](input_ids=batch["input_ids"][:, :4]).logits.mean()
            return found

    trainer_options: dict[str, Any] = {"module": Hidden(), "limit_val_batches": 0}
    with pytest.raises(ConfigError, match="saw no losses"):
        fit(folder, [DomainReweighting(reference=NOTHING)], **trainer_options)


def test_a_checkpoint_of_another_reference(folder: Path, tmp_path: Path) -> None:
    fit(folder, [DomainReweighting(reference=NOTHING)], 2, Stranger()).save_checkpoint(tmp_path / "2.ckpt")
    refused(folder, "reference = mapping, and this run has source", {}, ckpt_path=tmp_path / "2.ckpt")


def test_a_checkpoint_without_reweighting(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit(folder, [], 2, Stranger()).save_checkpoint(tmp_path / "2.ckpt")
    refused(folder, "begins at step 2 without a checkpoint", {}, ckpt_path=tmp_path / "2.ckpt")
    fit(folder, [DomainReweighting(reference=NOTHING)], 4, Stranger(), ckpt_path=tmp_path / "2.ckpt")
