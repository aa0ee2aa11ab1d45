"""Several cuts in one run: who decides what, in which order, and what remains."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightprune as lp
from lightprune.anatomy import Shape, anatomy_of
from lightprune.masks.unit_masks import masked
from lightprune.pipeline import Pipeline
from lightprune.pipeline.part import smaller
from tests.families import left_padded, tiny_lm
from tests.training import Plain, Spy, batches, fit, trainer_for

WHOLE = Shape(layers=6, hidden=32, heads=4, kv_groups=2, head_dim=8, channels=48)


def channels_of(path: Path, shape: Shape, keep: int, offset: int = 0) -> str:
    """A plan for a model of this shape that keeps `keep` channels, others in every layer, beginning at `offset`."""
    lm = tiny_lm(
        num_layers=shape.layers,
        intermediate_size=shape.channels,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_groups,
    )
    step = [[(offset + layer + 5 * i) % shape.channels for i in range(keep)] for layer in range(shape.layers)]
    lp.PruningPlan.keeping(anatomy_of(lm), channels=step).save(path)
    return str(path)


def test_layers_then_channels_in_one_fit(tmp_path: Path) -> None:
    module = Plain(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    path = channels_of(tmp_path / "plan.json", Shape(4, 32, 4, 2, 8, 48), keep=31)
    seen = Spy(lambda trainer, m: (trainer.global_step, anatomy_of(m.lm).shape, Pipeline.of(trainer).phase))  # type: ignore[union-attr]
    callbacks = [
        seen,
        lp.RandomSelector(drop=2),
        lp.StructuredCut(at=2),
        lp.PlanFromFile(path, start=4),
        lp.StructuredCut(at=6),
    ]
    trainer = fit(module, callbacks, batches(8), max_steps=8)
    shapes = {step: shape for step, shape, _ in seen.seen}
    # The spy stands in front: it sees a step before the cut that follows it.
    assert shapes[2] == WHOLE
    assert shapes[3] == shapes[6] == Shape(4, 32, 4, 2, 8, 48)
    assert shapes[7] == Shape(4, 32, 4, 2, 8, 31)
    phases = ["transfer", "transfer", "recover", "select", "transfer", "transfer", "recover", "recover"]
    assert [phase for _, _, phase in seen.seen] == phases
    optimizer = trainer.optimizers[0]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    for parameter in module.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"] == 8


def test_the_plans_of_several_cuts_are_one_plan_for_the_first_model(tmp_path: Path) -> None:
    """The original model, masked by what `executed` says, computes what the model cut twice does."""
    lm = tiny_lm("llama_tied").eval()
    module = Plain(tiny_lm("llama_tied"), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    path = channels_of(tmp_path / "plan.json", Shape(5, 32, 4, 2, 8, 48), keep=17)
    later = channels_of(tmp_path / "later.json", Shape(5, 32, 4, 2, 8, 17), keep=7, offset=3)
    callbacks = [
        lp.RandomSelector(drop=1, seed=3),
        lp.StructuredCut(at=1),
        lp.PlanFromFile(path, start=2),
        lp.StructuredCut(at=3),
        lp.PlanFromFile(later, start=4),
        lp.StructuredCut(at=4),
    ]
    trainer = trainer_for(callbacks, 5)
    executed: list[Any] = []
    trainer.callbacks.insert(0, Spy(lambda t, m: executed.append(Pipeline.of(t).executed)))  # type: ignore[attr-defined, union-attr]
    trainer.fit(module, batches(5), batches(1))
    plan = executed[-1]
    assert plan.source == WHOLE
    assert plan.shape == Shape(5, 32, 4, 2, 8, 7)
    batch, anatomy = left_padded(), anatomy_of(lm)
    plan.validate(anatomy)
    with torch.no_grad(), masked(anatomy, plan):
        expected = lm(**batch).logits
    with torch.no_grad():
        logits = module.lm.eval()(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)
    # And through JSON.
    assert lp.PruningPlan.from_json(plan.to_json()) == plan


def test_a_regularizer_without_steps_acts_before_every_cut() -> None:
    annealing = lp.GateAnnealing()
    alphas = Spy(lambda trainer, m: (trainer.global_step, Pipeline.of(trainer).status().get("alpha")))  # type: ignore[union-attr]
    callbacks = [
        alphas,
        lp.RandomSelector(drop=1),
        lp.StructuredCut(at=2),
        lp.RandomSelector(drop=1, start=4),
        lp.StructuredCut(at=8),
        annealing,
    ]
    module = Plain()
    cuts = [c for c in callbacks if isinstance(c, lp.StructuredCut)]
    fit(module, callbacks, batches(9), max_steps=9)
    for cut in cuts:
        assert cut.metrics["before"] == pytest.approx(cut.metrics["after"], rel=1e-6)
    assert [alpha for _, alpha in alphas.seen] == [0.5, 0.0, None, None, 0.75, 0.5, 0.25, 0.0, None]
    assert anatomy_of(module.lm).num_layers == 4


def test_a_resume_with_other_steps_is_refused(tmp_path: Path) -> None:
    data = batches(4)
    trainer = fit(Plain(), [lp.RandomSelector(drop=1), lp.StructuredCut(at=2)], data, max_steps=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = trainer_for([lp.RandomSelector(drop=1), lp.StructuredCut(at=3)], 4)
    with pytest.raises(lp.ConfigError, match=r"saved with StructuredCut\{'begins': 2\}.*steps that StructuredCut had"):
        other.fit(Plain(), data, ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("named", ["drop", "file"])
def test_the_same_callbacks_go_on_between_two_cuts(named: str, tmp_path: Path) -> None:
    """Broken off in a notebook: the module is cut once already, and the first selector's settings fit it no more."""

    class BreakOff(Callback):
        at: int | None = 3

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == self.at:
                raise InterruptedError

    module = Plain()
    lp.PruningPlan.dropping(anatomy_of(module.lm), [1, 3, 4]).save(tmp_path / "plan.json")
    stop = BreakOff()
    callbacks = [
        lp.RandomSelector(drop=3) if named == "drop" else lp.PlanFromFile(str(tmp_path / "plan.json")),
        lp.StructuredCut(at=1),
        lp.RandomUnitSelector(channels=20, start=4),
        lp.StructuredCut(at=5),
        stop,
    ]
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
    with pytest.raises(InterruptedError):
        fit(module, [*callbacks, saver], batches(6), max_steps=6, enable_checkpointing=True)
    assert anatomy_of(module.lm).shape == Shape(3, 32, 4, 2, 8, 48)
    stop.at = None
    trainer_for(callbacks, 6).fit(module, batches(6), batches(1), ckpt_path=tmp_path / "last.ckpt")
    assert anatomy_of(module.lm).shape == Shape(3, 32, 4, 2, 8, 20)


def test_a_cut_that_takes_nothing_away_is_resumed(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [lp.RandomUnitSelector(channels=48), lp.StructuredCut(at=1)]

    trainer = fit(Plain(), callbacks(), batches(2), max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = trainer_for(callbacks(), 3)
    resumed.fit(Plain(), batches(3), batches(1), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.global_step == 3


def test_after_the_cut_another_optimizer_may_go_on() -> None:
    module, callbacks = Plain(), [lp.RandomUnitSelector(channels=20), lp.StructuredCut(at=1)]
    trainer = fit(module, callbacks, batches(1), max_steps=1)
    module.make_optimizer = lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, batches(2), batches(1))
    assert trainer.global_step == 2


def test_two_plans_leave_the_smaller_of_every_count() -> None:
    assert smaller(Shape(4, 32, 4, 2, 8, 48), Shape(6, 32, 2, 1, 8, 40)) == Shape(4, 32, 2, 1, 8, 40)
