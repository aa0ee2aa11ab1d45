"""Every selector in every ordinary run: it ends with a model that works, or with a sentence, and never in between."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import lightprune as lp
from lightprune.anatomy import anatomy_of
from lightprune.selectors import Selector
from tests.families import tiny_lm, tokens
from tests.training import Batch, Plain, batches, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYERS, STOP, CUT, STEPS = 3, 2, 3, 4
SELECTORS: dict[str, Callable[[Path], Selector]] = {
    "BlockInfluenceSelector": lambda _: lp.BlockInfluenceSelector(drop=1, stop=STOP),
    "GreedyPerplexitySelector": lambda _: lp.GreedyPerplexitySelector(drop=1, stop=STOP),
    "LayerGateSelector": lambda _: lp.LayerGateSelector(drop=1, steps_per_round=STOP),
    "RandomSelector": lambda _: lp.RandomSelector(drop=1),
    "PlanFromFile": lambda folder: lp.PlanFromFile(str(folder / "plan.json")),
    "HardConcreteSelector": lambda _: lp.HardConcreteSelector(layers=2, hidden=24, stop=STOP),
    "MagnitudeUnitSelector": lambda _: lp.MagnitudeUnitSelector(channels=32, kv_groups=1),
    "RandomUnitSelector": lambda _: lp.RandomUnitSelector(hidden=24),
    "ActivationUnitSelector": lambda _: lp.ActivationUnitSelector(channels=32, hidden=24, stop=STOP),
    "TaylorUnitSelector": lambda _: lp.TaylorUnitSelector(channels=32, hidden=24, stop=STOP),
}


class Ordinary(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def loss(self, batch: Batch) -> Tensor:
        return self.lm(**batch).loss


class OnTheDecoder(Ordinary):
    def loss(self, batch: Batch) -> Tensor:
        states = anatomy_of(self.lm).decoder(batch["input_ids"]).last_hidden_state
        return cross_entropy(self.lm.lm_head(states[:, :-1]).flatten(0, 1), batch["labels"][:, 1:].flatten())


class OfEmbeddings(Ordinary):
    def loss(self, batch: Batch) -> Tensor:
        logits = self.lm(inputs_embeds=self.lm.get_input_embeddings()(batch["input_ids"])).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


# By what a run ends; by time and by early stopping perhaps before the cut.
LENGTHS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": STEPS},
    "max_epochs": {"max_epochs": 2},
    "max_time": {"max_epochs": 99, "max_time": timedelta(milliseconds=100)},
    "early stopping": {"max_epochs": 99},
}


def ends(folder: Path, name: str, kind: type[Ordinary], length: str, validation: bool) -> None:
    """Run it to its end, which is one of those that there may be."""
    monitored = "val/loss" if validation else "train/loss"
    stopping: list[Callback] = [EarlyStopping(monitored, patience=1, min_delta=99.0)]
    cut = lp.StructuredCut(at=CUT)
    out = folder / f"{length}, {validation}"
    callbacks = [
        SELECTORS[name](folder),
        cut,
        lp.ExportHF(str(out)),
        *(stopping if length == "early stopping" else []),
    ]
    trainer = trainer_for(callbacks, **{"max_steps": -1, "default_root_dir": folder} | LENGTHS[length])
    module = kind(tiny_lm(num_layers=LAYERS))
    data = batches(STEPS // 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data, batches(1) if validation else None)
        except lp.ConfigError:
            refused = trainer.global_step == 0 and (name, kind) == ("GreedyPerplexitySelector", OfEmbeddings)
            if refused:
                return
            raise
    assert cut.done or trainer.global_step < CUT
    assert cut.done or length in ("max_time", "early stopping")
    assert set(cut.metrics) == ({"before", "after"} if cut.done else set())
    assert all(bool(metrics) == validation for metrics in cut.metrics.values())
    assert cut.done == out.exists()
    if not cut.done:
        assert any("before the cut at step 3, so this cut was not made" in str(warning.message) for warning in told)
        return
    exported = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.allclose(exported(tokens()).logits, module.lm.eval()(tokens()).logits, atol=1e-4)


@pytest.mark.parametrize("kind", [Ordinary, OnTheDecoder, OfEmbeddings])
@pytest.mark.parametrize("name", SELECTORS)
def test_it_ends_with_a_model_or_a_sentence(name: str, kind: type[Ordinary], tmp_path: Path) -> None:
    lp.PruningPlan.dropping(anatomy_of(tiny_lm(num_layers=LAYERS)), [1]).save(tmp_path / "plan.json")
    for length in LENGTHS:
        for validation in (True, False):
            ends(tmp_path, name, kind, length, validation)
