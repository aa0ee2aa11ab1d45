"""Whatever data, loss and length a run is given: it ends with a model or with a sentence, never with a traceback."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lightprune as lp
from lightprune.pipeline import Part
from tests.families import tiny_lm
from tests.training import Batch, batches, trainer_for


class HFLoss(L.LightningModule):
    """Takes the loss that the Hugging Face model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_lm()

    def loss(self, batch: Batch) -> Tensor:
        return self.net(**batch).loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class DecoderLoss(HFLoss):
    """Calls the decoder and the head, never the model itself."""

    def loss(self, batch: Batch) -> Tensor:
        hidden = self.net.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        return F.cross_entropy(self.net.lm_head(hidden).flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Embedded(HFLoss):
    """Embeds the tokens itself."""

    def loss(self, batch: Batch) -> Tensor:
        embedded = self.net.get_input_embeddings()(batch["input_ids"])
        return self.net(inputs_embeds=embedded, labels=batch["labels"]).loss


def from_file(folder: Path) -> lp.PlanFromFile:
    lp.PruningPlan.dropping(lp.anatomy_of(tiny_lm()), [1, 3]).save(folder / "plan.json")
    return lp.PlanFromFile(str(folder / "plan.json"))


SELECTORS: dict[str, Callable[[Path], Part]] = {
    "gates": lambda folder: lp.LayerGateSelector(drop=2, stop=4),
    "block influence": lambda folder: lp.BlockInfluenceSelector(drop=2, stop=3),
    "greedy perplexity": lambda folder: lp.GreedyPerplexitySelector(drop=2, stop=2),
    "random layers": lambda folder: lp.RandomSelector(drop=2),
    "file": from_file,
    "random units": lambda folder: lp.RandomUnitSelector(channels=16),
    "magnitude": lambda folder: lp.MagnitudeUnitSelector(hidden=0.5, multiple_of=8),
    "activations": lambda folder: lp.ActivationUnitSelector(channels=16, kv_groups=1, stop=3),
    "taylor": lambda folder: lp.TaylorUnitSelector(channels=16, stop=3),
    "hard concrete": lambda folder: lp.HardConcreteSelector(stop=4, channels=16),
}
LENGTHS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": 6},
    "max_epochs": {"max_epochs": 2},
    "max_time": {"max_time": timedelta(milliseconds=300)},
    "early stopping": {"max_steps": 40},
}


@pytest.mark.parametrize("module", [HFLoss, DecoderLoss, Embedded])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("validation", [False, True], ids=["training data only", "training and validation"])
def test_a_run_ends_with_a_model_or_a_sentence(
    validation: bool, selector: str, length: str, module: type[HFLoss], tmp_path: Path
) -> None:
    data = batches(4)
    parts = [SELECTORS[selector](tmp_path), lp.StructuredCut(at=5), lp.ExportHF(str(tmp_path / "pruned"))]
    if length == "early stopping":
        parts.append(EarlyStopping("train_loss", patience=1, min_delta=9.0, check_on_train_epoch_end=True))
    trainer = trainer_for(parts, **{"max_steps": -1, **LENGTHS[length]})
    refused = ""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(module(), data, data[:1] if validation else None)
        except lp.ConfigError as error:
            refused = str(error)
    if refused:
        assert "\n" not in refused
        assert trainer.global_step <= 1, "what cannot work is refused before the run has begun"
        return
    if parts[1].done:
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        assert sum(p.numel() for p in exported.parameters()) < sum(p.numel() for p in tiny_lm().parameters())
    else:
        assert any("before the cut" in str(warning.message) for warning in told)
