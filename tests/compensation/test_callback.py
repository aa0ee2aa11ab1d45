"""`LeastSquaresCompensation` in a fit."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightprune as lp
from lightprune import ConfigError, LeastSquaresCompensation
from lightprune.compensation.callback import joined
from lightprune.data import TextDataModule
from tests.families import tiny_lm, tokens
from tests.training import Plain, assert_equal, batches, byte_tokenizer, fit, trainer_for, weights


def apart(module: Plain) -> float:
    ids = tokens(8, 12, seed=999)
    with torch.no_grad():
        return float((module.lm.eval()(ids).logits - tiny_lm().eval()(ids).logits).square().mean())


def run(*parts: Callback, steps: int = 2, **kwargs: Any) -> Plain:
    module = Plain()
    callbacks = [*parts, lp.BlockInfluenceSelector(drop=2, stop=2), lp.StructuredCut(at=2)]
    fit(module, callbacks, batches(16, batch=4), max_steps=steps, **kwargs)
    return module


def test_it_works_alone_without_a_step_of_training(tmp_path: Path) -> None:
    part = LeastSquaresCompensation(batches=16)
    module = run(part, lp.ExportHF(str(tmp_path / "out")))
    assert apart(module) < apart(run())
    assert [one.path for one in part.refitted if one.strength is not None]
    assert part.seconds > 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(weights(exported), weights(module.lm))


def test_a_rotated_cut_of_hidden_dimensions_goes_on_and_is_exported(tmp_path: Path) -> None:
    module = Plain()
    part = LeastSquaresCompensation(batches=16, rotate=True)
    selector = lp.ActivationUnitSelector(hidden=24, stop=2)
    callbacks = [part, selector, lp.StructuredCut(at=2), lp.Distillation(start=2), lp.ExportHF(str(tmp_path / "out"))]
    fit(module, callbacks, batches(16, batch=4), max_steps=4)
    assert module.lm.config.hidden_size == 24
    plain = Plain()
    fit(
        plain, [lp.ActivationUnitSelector(hidden=24, stop=2), lp.StructuredCut(at=2)], batches(16, batch=4), max_steps=2
    )
    assert apart(module) < apart(plain)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(weights(exported), weights(module.lm))


def test_the_batches_are_not_consumed() -> None:
    seen: list[list[int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            seen.append(batch["input_ids"][0].tolist())

    run(LeastSquaresCompensation(batches=8), Look(), steps=4)
    with_it, seen = list(seen), []
    run(Look(), steps=4)
    assert with_it == seen


def test_of_a_text_data_module_they_are_those_that_come_next(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("All the world is a stage, and the men and women merely players. " * 80)
    data = TextDataModule(
        {"plays": {"files": str(tmp_path / "plays.txt")}},
        tokenizer=byte_tokenizer(),
        block_size=16,
        batch_size=2,
        validation=2,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    consuming = iter(loader)
    next(consuming)
    ahead = loader.upcoming()
    expected = [next(ahead)["input_ids"] for _ in range(5)]
    assert data.tokens_seen == {"plays": 32}
    for one in expected:
        assert torch.equal(next(consuming)["input_ids"], one)


def test_the_random_state_of_the_run_is_left_alone() -> None:
    def state(*parts: Callback) -> torch.Tensor:
        torch.manual_seed(0)
        module = Plain()
        loader = DataLoader(tokens(16, 8), batch_size=4, shuffle=True, collate_fn=lambda rows: as_batch(rows))
        trainer_for([*parts, lp.RandomSelector(drop=2), lp.StructuredCut(at=0)], 1).fit(module, loader)
        return torch.rand(3)

    assert torch.equal(state(LeastSquaresCompensation(batches=2)), state())


def as_batch(rows: Any) -> dict[str, torch.Tensor]:
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_resumed_after_the_cut_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 4:
                raise InterruptedError

    def go(folder: Path, *others: Callback, ckpt_path: str | None = None) -> Plain:
        from tests.resume_run import Shuffled

        parts = [
            *others,
            lp.BlockInfluenceSelector(drop=2, stop=2),
            LeastSquaresCompensation(batches=6),
            lp.StructuredCut(at=2),
            lp.Recovery(lr=1e-3),
            ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0),
        ]
        module = Plain()
        trainer = trainer_for(parts, 6, enable_checkpointing=True, default_root_dir=folder)
        trainer.fit(module, Shuffled(8), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    whole = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "again", Stop())
    assert_equal(weights(go(tmp_path / "again", ckpt_path="last")), weights(whole))


def test_with_two_cuts_both_are_compensated() -> None:
    part = LeastSquaresCompensation(batches=8)
    callbacks = [
        part,
        lp.RandomSelector(drop=1),
        lp.StructuredCut(at=1),
        lp.RandomUnitSelector(channels=32, start=2),
        lp.StructuredCut(at=3),
    ]
    module = Plain()
    fit(module, callbacks, batches(16, batch=4), max_steps=4)
    assert len(part.refitted) == 5 + 4  # of the second cut: five down projections, and attention behind the first loss
    assert (module.lm.config.num_hidden_layers, module.lm.config.intermediate_size) == (5, 32)


def test_batches_of_one_length_are_joined() -> None:
    def batch(rows: int, length: int, first: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(first, first + rows * length).view(rows, length)}

    batches = [batch(2, 8, 0), batch(2, 8, 16), batch(3, 8, 32), batch(2, 4, 56), batch(2, 4, 64), batch(1, 8, 72)]
    found = joined(batches, tokens=30)
    assert [tuple(one["input_ids"].shape) for one in found] == [(4, 8), (3, 8), (4, 4), (1, 8)]
    assert torch.cat([one["input_ids"].flatten() for one in found]).tolist() == list(range(80))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([LeastSquaresCompensation(batches=1)], "LeastSquaresCompensation.batches is 1"),
        ([LeastSquaresCompensation(held_out=1.0)], "LeastSquaresCompensation.held_out is 1.0"),
        ([LeastSquaresCompensation(layers="some")], "LeastSquaresCompensation.layers is 'some'"),  # type: ignore[arg-type]
        (
            [LeastSquaresCompensation(rotate=True), lp.Distillation(hidden=0.5)],
            "Distillation.hidden is 0.5, and LeastSquaresCompensation.rotate is true",
        ),
        ([LeastSquaresCompensation(), lp.GateAnnealing()], "GateAnnealing trains the model to do without what goes"),
    ],
)
def test_refused_before_the_first_step(parts: list[Callback], sentence: str) -> None:
    module = Plain()
    before = weights(module)
    with pytest.raises(ConfigError, match=sentence):
        fit(module, [*parts, lp.RandomSelector(drop=2), lp.StructuredCut(at=2)], batches(4), max_steps=4)
    assert_equal(weights(module), before)


def test_without_a_cut_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="refits at the cut, and there is none"):
        fit(Plain(), [LeastSquaresCompensation()], batches(2), max_steps=1)
