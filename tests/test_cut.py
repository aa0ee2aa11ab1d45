"""`StructuredCut` in a running fit."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightprune import (
    BlockInfluenceSelector,
    GateAnnealing,
    GreedyPerplexitySelector,
    PlanFromFile,
    PruningPlan,
    RandomSelector,
    RunReport,
    StructuredCut,
)
from lightprune.anatomy import anatomy_of
from lightprune.pipeline import Pipeline
from tests.families import FAMILIES, left_padded, tiny_lm
from tests.surgery.test_model import assert_same, cached_logits, cut_copy, logits_of
from tests.training import Batches, Plain, Spy, assert_equal, batches, fit, trainer_for, weights

DROP = [0, 4]


def parts(lm: Any, tmp_path: Any, at: int, **kwargs: Any) -> tuple[PlanFromFile, StructuredCut]:
    PruningPlan.dropping(anatomy_of(lm), DROP).save(tmp_path / "plan.json")
    return PlanFromFile(str(tmp_path / "plan.json")), StructuredCut(at=at, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_at_the_end_of_a_fit_that_changes_no_weight_is_surgery_alone(name: str, tmp_path: Any) -> None:
    lm, batch = tiny_lm(name), left_padded()
    expected = cut_copy(lm, DROP)
    module = Plain(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    selector, cut = parts(lm, tmp_path, at=2)
    trainer = fit(module, [cut, selector], batches(2), max_steps=2)
    assert cut.done
    assert cut.step == trainer.global_step == 2
    assert_equal(weights(lm), weights(expected))
    assert_same(logits_of(lm, batch), logits_of(expected, batch), 0)
    assert_same(cached_logits(lm, batch), logits_of(expected, batch))
    assert cut.parameters == {
        "before": sum(p.numel() for p in tiny_lm(name).parameters()),
        "after": sum(p.numel() for p in expected.parameters()),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_cut_comes_after_its_optimizer_step(accumulate: int, tmp_path: Any) -> None:
    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=2)
    before, after = (
        Spy(lambda trainer, m: (trainer.global_step, len(anatomy_of(m.lm).layers)), hook)
        for hook in ("on_train_batch_start", "on_train_batch_end")
    )
    fit(Plain(lm), [before, after, selector, cut], batches(12), max_steps=4, accumulate_grad_batches=accumulate)
    # The last spy comes before the cut in the order of callbacks, so it sees the cut from the next batch on.
    assert before.seen == [(i // accumulate, 6 if i < 2 * accumulate else 4) for i in range(4 * accumulate)]
    assert cut.step == 2


def test_metrics_are_those_of_the_uncut_and_the_cut_model_and_reach_the_logger(tmp_path: Any) -> None:
    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=1)
    module = Plain(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    logger = CSVLogger(tmp_path)
    data = batches(2)
    trainer = trainer_for([selector, cut], 3, logger=logger, log_every_n_steps=1)
    uncut = tiny_lm().eval()
    expected = {
        moment: sum(model(**batch, use_cache=False).loss.item() for batch in data) / 2
        for moment, model in (("before", uncut), ("after", cut_copy(uncut, DROP)))
    }
    trainer.fit(module, batches(3), data)
    for moment, loss in expected.items():
        assert cut.metrics[moment] == {"val/loss": pytest.approx(loss, rel=1e-5)}
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "cut/before/val/loss" in lines
    assert "cut/after/val/loss" in lines


def test_without_validation_there_are_no_metrics_and_no_validation(tmp_path: Any) -> None:
    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=1, validate=False)
    spy = Spy(lambda *_: None, "on_validation_start")
    fit(Plain(lm), [spy, selector, cut], batches(3), max_steps=3, limit_val_batches=0)
    assert cut.metrics == {}
    assert spy.seen == []


def test_validation_at_the_cut_disturbs_neither_the_loop_nor_the_result(tmp_path: Any) -> None:
    def run(validate: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
        lm = tiny_lm()
        selector, cut = parts(lm, tmp_path, at=2, validate=validate)
        spy = Spy(lambda trainer, _: trainer.fit_loop.epoch_loop.batch_idx)
        fit(Plain(lm), [spy, selector, cut], batches(3), max_steps=6)
        return weights(lm), spy.seen

    with_validation, without = run(True), run(False)
    assert_equal(with_validation[0], without[0])
    assert with_validation[1] == without[1]


class NoStep(Plain):
    validation_step = None  # type: ignore[assignment]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches(2)


WITHOUT_VALIDATION: dict[str, tuple[type[Plain], Any, dict[str, Any]]] = {
    "no step": (NoStep, (batches(2),), {}),
    "no data": (Plain, (batches(2),), {}),
    "a data module without data": (Plain, (Data(),), {}),
    "an empty loader": (Plain, (batches(2), Batches([])), {}),
    "no loader": (Plain, (batches(2), []), {}),
    "none asked for": (Plain, (batches(2), batches(1)), {"limit_val_batches": 0}),
}


@pytest.mark.parametrize("case", WITHOUT_VALIDATION)
def test_a_run_without_validation_is_cut_all_the_same(case: str, tmp_path: Any) -> None:
    module, data, options = WITHOUT_VALIDATION[case]
    cut = StructuredCut(at=1)
    trainer = trainer_for([RandomSelector(drop=1), cut, RunReport()], 2, default_root_dir=tmp_path, **options)
    trainer.fit(module(), *data)
    assert cut.done
    assert cut.metrics == {"before": {}, "after": {}}
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == {}


def test_metrics_of_several_loaders(tmp_path: Any) -> None:
    selector, cut = parts(tiny_lm(), tmp_path, at=1)

    class Two(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    trainer = trainer_for([selector, cut], 2)
    trainer.fit(Two(), batches(2), [batches(1), batches(1, seed=7)])
    names = {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"}
    assert [set(metrics) for metrics in cut.metrics.values()] == [names] * 2
    assert len(set(cut.metrics["before"].values())) == 2


def test_training_continues_in_training_mode(tmp_path: Any) -> None:
    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=1)
    spy = Spy(lambda trainer, m: all(child.training for child in m.modules()), "on_before_zero_grad")
    fit(Plain(lm), [spy, selector, cut], batches(3), max_steps=3)
    assert spy.seen == [True] * 3


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = True


class Endless(IterableDataset[Any]):
    """Whose length nobody knows, and which is short."""

    def __iter__(self) -> Any:
        return iter(batches(2))


# What ends a run that might have come to its cut at step 7.
EARLY: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "it is told to stop": (lambda: [Stop()], {"max_steps": 9}),
    "early stopping": (
        lambda: [EarlyStopping("val/loss", patience=1, min_delta=9.0)],
        {"max_steps": 9, "val_check_interval": 1},
    ),
    "time": (lambda: [Timer({"milliseconds": 1}, interval="step")], {"max_epochs": 9}),
    "a short iterable": (lambda: [], {"max_epochs": 1}),
    "gradient accumulation": (lambda: [GradientAccumulationScheduler({0: 1, 1: 3})], {"max_epochs": 3}),
}


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("case", EARLY)
def test_a_run_that_ends_before_its_cut_says_so(case: str, report: bool, tmp_path: Any) -> None:
    callbacks, options = EARLY[case]
    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=7)
    trainer = trainer_for(
        [*callbacks(), selector, cut, *([RunReport()] if report else [])],
        **{"max_steps": -1, "default_root_dir": tmp_path} | options,
    )
    data = DataLoader(Endless(), batch_size=None) if case == "a short iterable" else batches(3)
    with pytest.warns(UserWarning, match=r"ended at step \d, before the cut at step 7, .* to at most \d\.$") as said:
        trainer.fit(Plain(lm), data, batches(1))
    steps = trainer.global_step
    assert steps < 7
    assert sum(f"ended at step {steps}, before the cut" in str(warning.message) for warning in said) == 1
    assert not cut.done
    assert len(anatomy_of(lm).layers) == 6
    if report:
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["ended_before_cut"], summary["steps"]) == (7, steps)


def test_a_run_that_ends_before_its_selection_says_so() -> None:
    with pytest.warns(UserWarning, match="ended at step 2, before BlockInfluenceSelector decided at step 3.*step 2 at"):
        fit(Plain(), [BlockInfluenceSelector(drop=1, stop=3)], batches(2), max_steps=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_nothing_is_said_of_a_run_that_was_broken_off_or_is_complete(
    error: type[BaseException] | None, tmp_path: Any, recwarn: Any
) -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if error is not None and batch_idx == 1:
                raise error
            return super().training_step(batch, batch_idx)

    lm = tiny_lm()
    selector, cut = parts(lm, tmp_path, at=2)
    with nullcontext() if error is None else pytest.raises((SystemExit, ValueError)):
        fit(Breaks(lm), [selector, cut, RunReport()], batches(3), max_steps=3, default_root_dir=tmp_path)
    assert not [warning for warning in recwarn if "ended at step" in str(warning.message)]
    if error is None:
        assert json.loads((tmp_path / "summary.json").read_text())["ended_before_cut"] is None


def test_state_is_plain(tmp_path: Any) -> None:
    """Checkpoints must load with `weights_only=True`, before and after the cut."""
    for at in (2, 4):
        lm = tiny_lm()
        selector, cut = parts(lm, tmp_path, at=at)
        trainer = fit(Plain(lm), [selector, cut], batches(4), max_steps=2 if at == 2 else 4)
        trainer.save_checkpoint(tmp_path / "some.ckpt")
        saved = torch.load(tmp_path / "some.ckpt", weights_only=True)["callbacks"]
        assert saved[cut.state_key]["plan"]["kept_layers"] == [1, 2, 3, 5]


def test_phases(tmp_path: Any) -> None:
    spy = Spy(lambda trainer, _: Pipeline.of(trainer).phase, "on_before_zero_grad")  # type: ignore[union-attr]
    callbacks = [spy, BlockInfluenceSelector(drop=1, stop=2), GateAnnealing(), StructuredCut(at=4)]
    fit(Plain(), callbacks, batches(5), max_steps=5)
    assert spy.seen == ["select", "select", "transfer", "transfer", "recover"]


def test_validation_at_the_cut_draws_no_random_number_from_training() -> None:
    """A loader that shuffles draws from the generator that dropout draws from."""

    def run(validate: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        module = Plain(tiny_lm("llama", attention_dropout=0.3))
        trainer = trainer_for([RandomSelector(drop=2), StructuredCut(at=2, validate=validate)], 5)
        shuffled = DataLoader(batches(4).data, batch_size=None, shuffle=True)
        trainer.fit(module, Batches(batches(3)), shuffled)
        return weights(module)

    with torch.random.fork_rng():
        assert_equal(run(True), run(False))


def test_modes_of_submodules_survive_the_cut_and_the_search() -> None:
    module = Plain()
    layers = list(anatomy_of(module.lm).layers)
    for frozen in (layers[1], layers[3].mlp, layers[4].self_attn):
        frozen.eval()
    modes = {child: child.training for child in module.modules()}
    fit(module, [GreedyPerplexitySelector(drop=2, stop=1), StructuredCut(at=2)], batches(4), max_steps=4)
    left = {child: child.training for child in module.modules()}
    stack = anatomy_of(module.lm).layers
    assert len(stack) == 4
    assert left.pop(stack)
    assert left == {child: modes[child] for child in left}
    assert not all(left.values())


def test_the_checkpoint_of_the_cuts_step_holds_the_cut_model(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(
        Plain(),
        [RandomSelector(drop=2), StructuredCut(at=3), saver],
        batches(6),
        max_steps=6,
        enable_checkpointing=True,
        val_check_interval=2,
    )
    layers = {}
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        names = [name for name in checkpoint["state_dict"] if name.endswith("down_proj.weight")]
        layers[path.name] = len(names)
        assert (checkpoint["callbacks"][StructuredCut(at=3).state_key]["plan"] is not None) == (len(names) == 4)
    assert layers == {"step=2.ckpt": 6, "step=3.ckpt": 4, "step=4.ckpt": 4, "step=6.ckpt": 4}
