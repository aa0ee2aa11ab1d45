"""`DomainReweighting` in real fits."""

from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightprune as lp
from lightprune.metrics import token_losses
from lightprune.reweighting import DomainReweighting
from lightprune.reweighting.robust import worst_case_weights
from tests.reweighting.runs import (
    DOMAINS,
    Consumed,
    Stranger,
    causal_lm,
    fit,
    metrics_of,
    reweighting_of,
    text_data,
    write_texts,
)
from tests.training import Spy, assert_equal, trainer_for, weights

NOTHING = dict.fromkeys(DOMAINS, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def of(metrics: dict[str, float], kind: str) -> np.ndarray:
    return np.array([metrics[f"domains/{kind}/{name}"] for name in DOMAINS])


@pytest.mark.parametrize("stranger", [False, True])
def test_weights_and_data_follow_the_weakest_domain(folder: Path, stranger: bool) -> None:
    consumed = Consumed()
    module = Stranger() if stranger else None
    trainer = fit(folder, [DomainReweighting(reference=NOTHING, every=5, radius=0.3), consumed], 30, module)
    logged = metrics_of(trainer)
    assert list(logged) == list(range(5, 31, 5))
    last = logged[30]
    np.testing.assert_allclose(of(last, "weight"), worst_case_weights(of(last, "loss"), np.full(3, 1 / 3), 0.3, 0.2))
    assert last["domains/weight/hard"] > 0.6 > last["domains/weight/easy"]
    assert trainer.datamodule.weights == pytest.approx(dict(zip(DOMAINS, of(last, "weight"), strict=True)))
    drawn = [domain for number, domains in consumed.domains.items() if number > 10 for domain in domains]
    assert drawn.count(1) / len(drawn) > 0.5
    for domain, name in enumerate(DOMAINS):
        samples = sum(domains.count(domain) for domains in consumed.domains.values())
        assert last[f"domains/tokens/{name}"] == 9 * samples


def test_a_stranger_is_seen_like_the_packages_own_module(folder: Path) -> None:
    module = Stranger()
    module.inner["net"].load_state_dict(causal_lm_weights(folder))
    runs = [fit(folder, [DomainReweighting(every=2)], 6, one, text_data(folder)) for one in (causal_lm(folder), module)]
    ours, theirs = (metrics_of(run) for run in runs)
    assert ours.keys() == theirs.keys() == {2, 4, 6}
    for step, metrics in ours.items():
        assert theirs[step] == pytest.approx(metrics, rel=1e-4)
    assert not module.inner["net"]._forward_hooks


def causal_lm_weights(folder: Path) -> dict[str, torch.Tensor]:
    module = causal_lm(folder)
    module.configure_model()
    return module.lm.state_dict()


def test_losses_are_running_means_of_the_batches(folder: Path) -> None:
    """Recomputed in a plain loop; the model stands still, as its learning rate is 0."""
    data, seen = text_data(folder), []
    remember = Spy(lambda trainer, module: None)
    remember.on_train_batch_end = lambda t, m, o, batch, i: seen.append(batch)  # type: ignore[method-assign]
    trainer = fit(
        folder,
        [DomainReweighting(reference=NOTHING, every=4, rule="constant"), remember],
        4,
        causal_lm(folder, lr=0.0),
        data,
        accumulate_grad_batches=2,
    )
    module: Any = trainer.lightning_module
    means: dict[int, float] = {}
    assert len(seen) == 8
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        batch = {name: torch.cat([first[name], second[name]]) for name in first}
        with torch.no_grad():
            sums, counts = token_losses(module.lm(input_ids=batch["input_ids"]).logits, batch["labels"])
        for domain in set(batch["domain"].tolist()):
            mine = batch["domain"] == domain
            loss = float(sums[mine].sum() / counts[mine].sum())
            means[domain] = 0.9 * means[domain] + 0.1 * loss if domain in means else loss
    (metrics,) = metrics_of(trainer).values()
    np.testing.assert_allclose(of(metrics, "loss"), [means[d] for d in range(3)], rtol=1e-5)


class ByHand(Stranger):
    """In manual optimization, two optimizer steps a batch."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.step()


def test_manual_optimization_with_steps_that_jump_over_an_update(folder: Path) -> None:
    trainer = fit(folder, [DomainReweighting(reference=NOTHING, every=3)], 12, ByHand())
    logged = metrics_of(trainer)
    assert list(logged) == [4, 6, 10, 12]  # the first even steps from 3, 6, 9 and 12 on
    assert of(logged[12], "tokens").sum() == 6 * 4 * 9


def test_accumulated_gradients_are_one_step(folder: Path) -> None:
    trainer = fit(folder, [DomainReweighting(reference=NOTHING, every=2)], 6, accumulate_grad_batches=3)
    assert list(metrics_of(trainer)) == [2, 4, 6]
    assert metrics_of(trainer)[6]["domains/tokens/easy"] % 9 == 0
    assert of(metrics_of(trainer)[6], "tokens").sum() == 6 * 3 * 4 * 9


def test_constant_leaves_weights_and_training_alone_and_logs(folder: Path) -> None:
    with_it = fit(folder, [DomainReweighting(rule="constant", every=3)], 6)
    without = fit(folder, [], 6)
    assert_equal(weights(with_it.lightning_module), weights(without.lightning_module))
    assert with_it.datamodule.weights == dict.fromkeys(DOMAINS, 1.0)
    logged = metrics_of(with_it)
    assert list(logged) == [3, 6]
    np.testing.assert_allclose(of(logged[6], "weight"), np.full(3, 1 / 3))
    np.testing.assert_allclose(of(logged[6], "excess"), of(logged[6], "loss") - of(logged[6], "reference"))


def test_sheared_moves_on_from_weights_to_weights(folder: Path) -> None:
    logged = metrics_of(fit(folder, [DomainReweighting(rule="sheared", reference=NOTHING, every=2)], 6))
    grown = of(logged[4], "weight") * np.exp(of(logged[6], "excess"))
    np.testing.assert_allclose(of(logged[6], "weight"), (1 - 1e-4) * grown / grown.sum() + 1e-4 / 3)


@pytest.mark.parametrize("reported", [False, True])
def test_the_source_models_own_losses_are_the_reference(folder: Path, reported: bool) -> None:
    """Measured by a validation of its own, or by another callback's, which then is the only one."""
    starts = Spy(lambda trainer, module: trainer.global_step, "on_validation_start")
    report = [lp.RunReport()] if reported else []
    trainer = fit(folder, [DomainReweighting(every=3), *report, starts], 6)
    assert starts.seen == ([0, 6] if reported else [0])
    module = causal_lm(folder)
    (expected,) = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    ).validate(module, datamodule=text_data(folder), verbose=False)
    logged = metrics_of(trainer)[3]
    scale = of(logged, "reference") / [expected[f"val/loss/{name}"] for name in DOMAINS]
    np.testing.assert_allclose(scale, np.round(scale[0], 1), rtol=1e-5)  # 1.0, 0.9, ...: the rule may scale it


def test_sanity_checking_measures_nothing(folder: Path) -> None:
    starts = Spy(lambda trainer, module: trainer.sanity_checking, "on_validation_start")
    fit(folder, [DomainReweighting(every=3), starts], 3, num_sanity_val_steps=1)
    assert starts.seen == [True, False]


def test_validation_losses_act_with_the_step_after_each_validation(folder: Path) -> None:
    found: list[dict[str, float]] = []
    remember = Spy(lambda trainer, module: found.append(dict(trainer.callback_metrics)), "on_validation_end")
    trainer = fit(
        folder,
        [DomainReweighting(losses="validation", reference=NOTHING), remember],
        10,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    logged = metrics_of(trainer)
    assert list(logged) == [4, 7, 10]
    for metrics, validated in zip(logged.values(), found, strict=True):
        np.testing.assert_allclose(of(metrics, "loss"), [validated[f"val/loss/{name}"] for name in DOMAINS], rtol=1e-6)


def test_a_validation_before_its_start_counts_for_nothing(folder: Path) -> None:
    weighting = DomainReweighting(losses="validation", reference=NOTHING, start=8)
    trainer = fit(folder, [weighting], 10, val_check_interval=3, check_val_every_n_epoch=None)
    assert list(metrics_of(trainer)) == [10]  # after the validation at step 9, not at 8 after that at 6


def test_it_acts_only_in_its_window(folder: Path) -> None:
    trainer = fit(folder, [DomainReweighting(reference=NOTHING, every=2, start=3, stop=8)], 12)
    logged = metrics_of(trainer)
    assert list(logged) == [3, 5, 7]
    assert list(trainer.datamodule.weights.values()) == list(of(logged[7], "weight"))


def test_a_domain_of_weight_0_is_left_out(folder: Path) -> None:
    data = text_data(folder, weights={"easy": 1.0, "hard": 0.0, "middle": 3.0})
    last = metrics_of(fit(folder, [DomainReweighting(every=2)], 6, data=data))[6]
    assert last["domains/weight/hard"] == last["domains/tokens/hard"] == 0
    assert "domains/loss/hard" not in last
    assert last["domains/ratio/easy"] == 0.25


def test_the_ratio_follows(folder: Path) -> None:
    with pytest.warns(UserWarning, match="all domains begin with the same share"):
        logged = metrics_of(fit(folder, [DomainReweighting(reference=NOTHING, every=1, dynamic_ratio=True)], 20))
    np.testing.assert_allclose(of(logged[20], "ratio"), np.full(3, 1 / 3))
    data = text_data(folder, weights={"easy": 0.2, "hard": 0.3, "middle": 0.5})
    logged = metrics_of(fit(folder, [DomainReweighting(reference=NOTHING, every=1, dynamic_ratio=True)], 20, data=data))
    assert logged[3]["domains/ratio/hard"] == pytest.approx(0.3)
    assert logged[20]["domains/ratio/hard"] > 0.31


def test_the_dynamic_reference_waits_for_its_first_fit(folder: Path) -> None:
    trainer = fit(folder, [DomainReweighting(reference="dynamic", every=1)], 16, limit_val_batches=0)
    logged = metrics_of(trainer)
    for step, metrics in logged.items():
        assert ("domains/reference/hard" in metrics) == (step > 11)
        if step <= 11:
            np.testing.assert_allclose(of(metrics, "weight"), np.full(3, 1 / 3))
    assert of(logged[16], "weight").max() > 0.34
    assert logged[16].keys() >= {f"domains/excess/{name}" for name in DOMAINS}


def test_the_figure_is_drawn(folder: Path, tmp_path: Path) -> None:
    fit(folder, [DomainReweighting(every=2)], 4, default_root_dir=tmp_path)
    picture = matplotlib.image.imread(tmp_path / "domains.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0


def depth() -> list[Any]:
    return [
        lp.LayerGateSelector(drop=2, rounds=1, steps_per_round=3, protect_first=0, protect_last=0),
        lp.DifferencePenalty(strength=0.01),
    ]


def width() -> list[Any]:
    return [
        lp.MagnitudeUnitSelector(channels=24),
        lp.GroupNormPenalty(strength=0.01),
    ]


@pytest.mark.parametrize("parts", [depth, width])
@pytest.mark.parametrize("losses", ["training", "validation"])
def test_beside_pruning_and_recovery(folder: Path, parts: Any, losses: Any) -> None:
    module = Stranger(layers=6)
    callbacks = [
        DomainReweighting(every=2, losses=losses, reference=NOTHING),
        *parts(),
        lp.StructuredCut(at=6),
        lp.Recovery(lr=1e-2),
        lp.RunReport(),
    ]
    trainer = fit(folder, callbacks, 12, module, val_check_interval=4, check_val_every_n_epoch=None)
    logged = metrics_of(trainer)
    assert set(logged) >= ({2, 4, 6, 8, 10, 12} if losses == "training" else {5, 9})
    for metrics in logged.values():
        moved = of(metrics, "weight") - 1 / 3
        assert moved.argmax() == of(metrics, "excess").argmax()
        assert moved.max() > 0.01
    shape = trainer.lightning_module.inner["net"].config
    assert (shape.num_hidden_layers, shape.intermediate_size) == ((4, 48) if parts is depth else (6, 24))


def test_it_comes_and_goes_without_a_trace(folder: Path) -> None:
    module = Stranger()
    trainer = fit(folder, [DomainReweighting(every=2)], 4, module)
    assert not module.inner["net"]._forward_hooks
    trainer.validate(module, datamodule=text_data(folder), verbose=False)
    again = fit(folder, [reweighting_of(trainer)], 4, Stranger())  # the same callback in a new run
    assert metrics_of(again)[4]["domains/tokens/easy"] <= 4 * 4 * 9


def test_validation_alone_needs_nothing_of_it(folder: Path) -> None:
    trainer = trainer_for([DomainReweighting()], 1, default_root_dir=folder)
    (metrics,) = trainer.validate(causal_lm(folder), datamodule=text_data(folder), verbose=False)
    assert "val/loss/easy" in metrics


def test_a_validation_that_a_resume_makes_up_for_sees_the_masks(folder: Path, tmp_path: Path) -> None:
    """Whichever of the two callbacks comes first."""

    def parts() -> list[Any]:
        weighting = DomainReweighting(losses="validation", reference=NOTHING)
        return [weighting, lp.HardConcreteSelector(stop=8, channels=8), lp.StructuredCut(at=8)]

    often: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    undisturbed = fit(folder, [*parts(), saves], 8, **often)
    resumed = fit(folder, parts(), 8, ckpt_path=tmp_path / "step=4.ckpt", **often)
    assert list(reweighting_of(resumed).history) == list(reweighting_of(undisturbed).history)


def test_a_checkpoint_saved_by_the_cuts_own_validation_has_all_of_the_step(folder: Path, tmp_path: Path) -> None:
    def parts() -> list[Any]:
        return [lp.RandomSelector(drop=1, start=2), lp.StructuredCut(at=6), DomainReweighting(every=3)]

    never: dict[str, Any] = {"val_check_interval": 1000, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    undisturbed = fit(folder, [*parts(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)], 12, **never)
    resumed = fit(folder, parts(), 12, ckpt_path=tmp_path / "step=6.ckpt", **never)
    assert list(reweighting_of(resumed).history) == list(reweighting_of(undisturbed).history)
    assert_equal(weights(resumed.lightning_module), weights(undisturbed.lightning_module))


RESUMES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "training": ({"every": 3}, [2, 3, 4]),
    "sheared": ({"every": 2, "rule": "sheared", "reference": NOTHING}, [3]),
    "dynamic": ({"every": 1, "reference": "dynamic", "dynamic_ratio": True}, [10, 11, 12]),
    "validation": ({"losses": "validation"}, [3, 4, 5]),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_does_what_an_uninterrupted_one_does(folder: Path, tmp_path: Path, name: str) -> None:
    options, steps = RESUMES[name]
    often: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    whole = Consumed()
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    undisturbed = fit(folder, [DomainReweighting(**options), whole, saves], 15, **often)
    expected = reweighting_of(undisturbed)
    assert len({tuple(row["weight"]) for row in expected.history}) > 1
    for step in steps:
        rest = Consumed()
        resumed = fit(
            folder, [DomainReweighting(**options), rest], 15, ckpt_path=tmp_path / f"step={step}.ckpt", **often
        )
        assert rest.batches == {number: ids for number, ids in whole.batches.items() if number >= step}
        assert repr(reweighting_of(resumed).state_dict()) == repr(expected.state_dict())  # NaN equals NaN
        assert_equal(weights(resumed.lightning_module), weights(undisturbed.lightning_module))
