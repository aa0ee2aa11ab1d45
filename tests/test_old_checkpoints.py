"""Checkpoints that earlier trees have saved resume in this one and end as they did there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import lightprune as lp
from tests.families import tiny_lm
from tests.resume_run import STEPS, Shuffled, callbacks_of
from tests.training import Plain, batches, trainer_for

SAVED = Path(__file__).parent / "checkpoints"
# What another processor's rounding may come to in some steps of Adam; a step more or less is 2e-3.
TOLERANCE = 5e-4


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3)


def resume(module: Plain, parts: list[Callback], data: Any, saved: str, max_steps: int) -> None:
    trainer = trainer_for(parts, max_steps=max_steps, val_check_interval=4)
    trainer.fit(module, data, batches(1), ckpt_path=SAVED / f"{saved}.pt", weights_only=True)
    assert trainer.global_step == max_steps


def assert_ended(module: Plain, expected: str) -> None:
    weights: dict[str, Tensor] = torch.load(SAVED / f"{expected}.pt", weights_only=True)
    ended = dict(module.named_parameters())
    for name in ended:
        torch.testing.assert_close(ended[name].detach(), weights[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("saved", ["depth-select", "depth-recover"])
def test_depth(saved: str) -> None:
    module = Plain(
        tiny_lm("qwen2"),
        optimizer=adamw,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30),
    )
    resume(module, callbacks_of({}), Shuffled(8), saved, STEPS)
    assert module.lm.config.num_hidden_layers == 4
    assert_ended(module, "depth-end")


def test_masks() -> None:
    module = Plain(tiny_lm("llama"), optimizer=adamw)
    parts = [
        lp.HardConcreteSelector(stop=6, layers=4, channels=24, hidden=24, multiple_of=8),
        lp.StructuredCut(at=8),
        lp.Recovery(lr=2e-3),
    ]
    resume(module, parts, Shuffled(12), "masks", 12)
    assert (module.lm.config.num_hidden_layers, module.lm.config.hidden_size) == (4, 24)
    assert_ended(module, "masks-end")
