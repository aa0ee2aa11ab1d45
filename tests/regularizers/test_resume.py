"""A run that is resumed in the middle of a window ends, bit for bit, as one that was never interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightprune as lp
from tests.families import tiny_lm
from tests.regularizers.by_hand import from_file, mean_of, plan_for
from tests.resume_run import Shuffled
from tests.test_resume import differences
from tests.training import Plain, batches, trainer_for

CUT, STEPS = 6, 8
PARTS: dict[str, Any] = {
    "annealing": lambda: lp.GateAnnealing("cosine", order="first_to_last"),
    "penalty": lambda: lp.GroupNormPenalty(20.0, ramp="linear"),
    "scales": lambda: lp.ScaleCalibration(),
    "scales, then weights": lambda: lp.ScaleCalibration(stop=3),
    "lasso to zero": lambda: lp.ProximalGroupLasso(),
    "lasso": lambda: lp.ProximalGroupLasso(20.0, start=1, stop=5),
}


def run(part: Any, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """From the beginning, or from a checkpoint in new objects; how it ended."""
    lm = tiny_lm("llama_tied")
    selector = from_file(plan_for("llama_tied", lm), folder)
    module = Plain(lm, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3))
    cut = lp.StructuredCut(at=CUT)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_for([selector, part, cut, saver], STEPS, enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(module, Shuffled(5), batches(1), ckpt_path=checkpoint, weights_only=True)
    return {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "metrics": cut.metrics}


@pytest.mark.parametrize("name", PARTS)
def test_resumed_in_the_window_it_ends_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = run(PARTS[name](), whole)
    assert expected["metrics"].keys() == {"before", "after"}
    for step in (1, 3, CUT - 1, CUT):
        folder = tmp_path / str(step)
        folder.mkdir()
        actual = run(PARTS[name](), folder, whole / f"step={step}.ckpt")
        assert differences(expected, actual) == [], step


def test_a_relative_penalty_keeps_what_it_is_relative_to(tmp_path: Path) -> None:
    """Its state says what the means were when the window began, not what they were when it was resumed."""
    part = lp.GroupNormPenalty(20.0)
    run(part, tmp_path)
    resumed = lp.GroupNormPenalty(20.0)
    (tmp_path / "resumed").mkdir()
    run(resumed, tmp_path / "resumed", tmp_path / "step=4.ckpt")
    assert resumed.state_dict() == part.state_dict()
    lm = tiny_lm("llama_tied")
    (references,) = part.state_dict()["references"].values()
    expected = {unit: mean_of("llama_tied", lm, unit, "l2").item() for unit in references}
    assert references == pytest.approx(expected, rel=1e-5)
    assert set(references) == {"heads", "kv_groups", "channels", "hidden"}
