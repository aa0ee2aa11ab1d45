"""Checkpoints before, at and after the cut, under each strategy; exports from ZeRO."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightprune as lp
from lightprune.cli import PruningTrainer
from lightprune.strategies.zero_checkpoint import whole_checkpoint
from tests.strategies.conftest import Pair
from tests.strategies.runs import CASES, CUT, METHODS, MOMENTS, STEPS, STRATEGIES, small_lm
from tests.training import Plain

ZERO = [strategy for strategy in STRATEGIES if strategy != "ddp"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "step"), [(name, step) for name, case in CASES.items() for step in case.steps])
def test_a_resumed_run_ends_like_the_undisturbed_one(strategy: str, name: str, step: int, pair: Pair) -> None:
    for end in pair.ends(strategy, name):
        undisturbed, resumed = end["undisturbed"], end[f"step={step}"]
        assert resumed["step"] == STEPS
        assert resumed["losses"] == undisturbed["losses"][-len(resumed["losses"]) :]
        for key in ("weights", *MOMENTS):
            assert undisturbed[key].keys() == resumed[key].keys()
            assert [n for n in resumed[key] if not torch.equal(resumed[key][n], undisturbed[key][n])] == []


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("step", [CUT, STEPS])
def test_what_zero_saved_is_exported_without_it(strategy: str, step: int, pair: Pair, tmp_path: Path) -> None:
    end = pair.ends(strategy, "resumed")[0]["undisturbed"]
    path = pair.folder / strategy / "resumed" / f"step={step}.ckpt"
    callbacks = [*METHODS["annealed"](), lp.StructuredCut(at=CUT)]
    trainer = PruningTrainer(callbacks=callbacks, accelerator="cpu", devices=1, logger=False, max_steps=STEPS)
    trainer.export(Plain(small_lm()), str(path), str(tmp_path / "export"))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.config.num_hidden_layers == 3
    saved = whole_checkpoint(path)["state_dict"]
    assert all(torch.equal(weight, saved[f"lm.{name}"]) for name, weight in lm.named_parameters())
    if step == STEPS:
        assert all(torch.equal(weight, end["weights"][f"lm.{name}"]) for name, weight in lm.named_parameters())


@pytest.mark.parametrize("strategy", ZERO)
def test_weights_that_nobody_trains_are_in_what_zero_saved(strategy: str, pair: Pair) -> None:
    pair.ends(strategy, "resumed, frozen")
    saved = whole_checkpoint(pair.folder / strategy / "resumed, frozen" / f"step={CUT + 1}.ckpt")["state_dict"]
    assert torch.equal(saved["lm.model.embed_tokens.weight"], saved["lm.lm_head.weight"])
    assert saved["lm.lm_head.weight"].shape == (257, 24)
    assert saved["lm.lm_head.weight"].isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_exports_what_it_ends_with(strategy: str, pair: Pair) -> None:
    end = pair.ends(strategy, "resumed")[0]["undisturbed"]
    lm = AutoModelForCausalLM.from_pretrained(pair.folder / strategy / "resumed" / "export")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert all(torch.equal(weight, end["weights"][f"lm.{name}"]) for name, weight in lm.named_parameters())


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(lp.ConfigError, match="no DeepSpeed checkpoint"):
        whole_checkpoint(tmp_path)
