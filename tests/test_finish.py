"""What is written when training ends is also written by a resume that finds training over."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightprune import ExportHF, PruningPlan, RandomSelector, RunReport, StructuredCut
from lightprune.errors import ConfigError
from tests.training import Batches, Plain, assert_equal, batches, trainer_for, weights

STEPS = 3


class Interrupt(Callback):
    """Ends a run after its last checkpoint and before anything is written; or as so many optimizer steps are over."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise InterruptedError


def run(folder: Path, *first: Callback, ckpt_path: Any = None) -> Plain:
    """A run whose cut comes with its last step; returns its module."""
    callbacks = [
        *first,
        RunReport(),
        RandomSelector(drop=2),
        StructuredCut(at=STEPS),
        ExportHF(str(folder / "pruned")),
        ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0),
    ]
    module = Plain()
    trainer = trainer_for(callbacks, STEPS, enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(module, batches(STEPS), Batches(batches(1)), ckpt_path=ckpt_path)
    return module


def summaries(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("summary*.json")}


def test_a_run_that_was_over_is_finished_by_a_resume(tmp_path: Path) -> None:
    run(tmp_path / "undisturbed")
    with pytest.raises(InterruptedError):
        run(tmp_path / "disturbed", Interrupt())
    assert not summaries(tmp_path / "disturbed")
    assert not (tmp_path / "disturbed" / "pruned").exists()
    module = run(tmp_path / "disturbed", ckpt_path="last")

    (expected,) = summaries(tmp_path / "undisturbed").values()
    (found,) = summaries(tmp_path / "disturbed").values()
    for key in ("before", "after", "dropped_layers", "plan", "cut_steps", "steps"):
        assert found[key] == expected[key]
    del expected["metrics"]["end"]  # too late to validate
    assert found["metrics"] == expected["metrics"]
    assert found["phases"]["transfer"]["tokens"] == expected["phases"]["transfer"]["tokens"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "disturbed" / "pruned")
    assert_equal(weights(exported), weights(module.lm))
    assert PruningPlan.load(tmp_path / "disturbed" / "pruned" / "pruning_plan.json").to_dict() == found["plan"]


def test_a_run_that_is_over_may_be_submitted_again(tmp_path: Path) -> None:
    """Slurm does, where it has told the job to stop in its last seconds."""
    run(tmp_path)
    weights_file = tmp_path / "pruned" / "model.safetensors"
    before = weights_file.stat().st_mtime_ns
    run(tmp_path, ckpt_path="last")
    assert weights_file.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.glob("pruned*")) == ["pruned"]


def test_a_run_that_is_not_over_may_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    run(tmp_path / "other")
    with pytest.raises(InterruptedError):
        run(tmp_path, Interrupt(1))
    shutil.copytree(tmp_path / "other" / "pruned", tmp_path / "pruned")
    with pytest.raises(ConfigError, match="exists already"):
        run(tmp_path, ckpt_path="last")


def test_an_ordinary_run_finishes_once(tmp_path: Path) -> None:
    run(tmp_path)
    assert set(summaries(tmp_path)) == {"summary.json"}


def test_every_fit_finishes(tmp_path: Path) -> None:
    report = RunReport()
    for _ in range(2):
        trainer_for([report], 1, default_root_dir=tmp_path).fit(Plain(), batches(1), batches(1))
    assert set(summaries(tmp_path)) == {"summary.json", "summary.1.json"}
