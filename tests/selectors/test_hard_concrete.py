"""`HardConcreteSelector` in whole fits: the exact shape, the fold at the cut, draws, evaluation, resume, bad inputs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightprune as lp
from lightprune.anatomy import Shape, anatomy_of
from lightprune.masks.soft_masks import UnitValues
from lightprune.selectors.hard_concrete.mask_set import MaskSet
from lightprune.surgery import resulting_parameters
from tests.families import left_padded, tiny_lm
from tests.logits import assert_same, logits_of
from tests.resume_run import Shuffled
from tests.test_loss_scale import changing_scale, fp16
from tests.test_masking import hooks
from tests.test_resume import differences
from tests.training import Batch, Plain, Spy, batches, fit, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MLP channels are no multiple of 64"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

EVERYTHING: dict[str, Any] = {"layers": 4, "heads": 1, "kv_groups": 1, "channels": 20, "hidden": 24}
SHAPE = Shape(layers=4, hidden=24, heads=1, kv_groups=1, head_dim=8, channels=20)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "olmo2", "phi3"])
def test_everything_at_once_to_the_exact_shape(name: str, tmp_path: Path) -> None:
    """The cut changes nothing: the masked model's loss just before is the cut model's just after."""
    module, cut = Plain(tiny_lm(name), optimizer=adam), lp.StructuredCut(at=14)
    selector = lp.HardConcreteSelector(stop=12, **EVERYTHING, seed=3)
    target = Shape(**{**vars(SHAPE), "head_dim": anatomy_of(module.lm).shape.head_dim})
    fit(module, [cut, selector], batches(6), max_steps=16, default_root_dir=tmp_path)
    assert anatomy_of(module.lm).shape == target
    assert cut.plan is not None
    assert all(len(kept) == 20 for kept in cut.plan.kept_channels or ())
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)
    assert hooks(module.lm) == 0
    assert (tmp_path / "masks.png").stat().st_size > 1000
    assert cut.plan.provenance["selector"] == "HardConcreteSelector"
    assert lp.PruningPlan.from_json(cut.plan.to_json()) == cut.plan


@pytest.mark.parametrize("name", ["gpt2", "opt_projected", "mixtral", "qwen3_moe", "gpt_neox"])
def test_a_budget_in_a_fit(name: str, tmp_path: Path) -> None:
    module, cut = Plain(tiny_lm(name), optimizer=adam), lp.StructuredCut(at=6)
    source = anatomy_of(module.lm).num_parameters
    selector = lp.HardConcreteSelector(stop=6, parameters=0.8, multiple_of=4)
    fit(module, [selector, cut], batches(6), max_steps=7, default_root_dir=tmp_path)
    assert 0.5 * source < anatomy_of(module.lm).num_parameters <= 0.8 * source
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)


def test_sparsity_follows_its_target_and_the_multipliers_ascend(tmp_path: Path) -> None:
    selector = lp.HardConcreteSelector(stop=60, channels=24, hidden=20)
    multipliers, shares = (
        Spy(lambda *_: selector.state_dict()["masks"]["multipliers"].clone()),
        Spy(lambda *_: (selector.sparsity, selector.target_sparsity)),
    )
    fit(Plain(), [multipliers, shares, selector], batches(8), max_steps=59, default_root_dir=tmp_path)
    history = selector.state_dict()["history"]
    assert [step for step, _ in history] == list(range(60))
    assert history[0][1]["channels"] == (pytest.approx(0.0, abs=3e-3), 0.0)
    assert history[6][1]["channels"][1] == pytest.approx(0.25)  # half of the warm-up's 12 steps
    for step, of_structures in history[30:]:
        assert of_structures["channels"][1] == 0.5, step
        assert of_structures["hidden"][1] == pytest.approx(0.375)
    late = torch.tensor([history[step][1]["channels"] for step in range(45, 60)])
    assert (late[:, 0].mean() - 0.5).abs() < 0.1
    # Too few are closed at first, and the first multiplier goes down to the price of an open one; none stands still.
    first, last = multipliers.seen[3], multipliers.seen[-1]
    assert (first[:, 0] < 0).all()
    assert (first[:, 1] > 0).all()
    assert (last[:, 1] > first[:, 1]).all()
    of_parameters = torch.tensor(shares.seen[45:])
    assert (of_parameters[:, 0].mean() - of_parameters[0, 1]).abs() < 0.1


class Recorder(Plain):
    """Keeps what the first output projection reads, relative to what it would read without masks."""

    def __init__(self, selector: lp.HardConcreteSelector) -> None:
        super().__init__()
        self.selector = selector
        self.drawn: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.drawn.append(self._values())
        with torch.no_grad():
            self.lm(**batch)
        assert torch.equal(self._values(), self.drawn[-1])  # a pass on the side leaves the batch's masks in place
        super().training_step(batch, batch_idx)
        assert torch.equal(self._values(), self.drawn[-1])  # and a second pass of the batch shares them
        return loss

    def _values(self) -> Tensor:
        units = self.selector._units
        assert units is not None
        assert units.values.hidden is not None
        return units.values.hidden.detach().clone()


def drawn(seed: int, accumulate: int = 1) -> list[Tensor]:
    selector = lp.HardConcreteSelector(stop=40, hidden=24, seed=seed)
    module = Recorder(selector)
    torch.seed()  # nothing depends on the global generator
    fit(module, [selector], batches(4), max_steps=4 // accumulate, accumulate_grad_batches=accumulate)
    return module.drawn


def test_every_batch_draws_once_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    once, again, other, accumulated = drawn(1), drawn(1), drawn(2), drawn(1, accumulate=2)
    assert all(torch.equal(left, right) for left, right in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    assert len({tuple(values.tolist()) for values in accumulated}) == 4
    assert torch.equal(accumulated[0], once[0])


def test_evaluation_is_deterministic(tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor]] = []
    selector = lp.HardConcreteSelector(stop=10, hidden=24, channels=12, warmup=0.8)

    class Validates(Plain):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            losses = [self.lm(**batch, use_cache=False).loss for _ in range(2)]
            assert torch.equal(*losses)
            if selector._units is not None and selector._units.values.hidden is not None:
                seen.append((self.trainer.global_step, selector._units.values.hidden.clone()))

    fit(Validates(), [selector], batches(12), max_steps=12, val_check_interval=1, default_root_dir=tmp_path)
    open_now = {step: int((hidden > 0).sum()) for step, hidden in seen}
    assert open_now == {step: 32 - int(8 * min(step / 8, 1) + 0.5) for step in range(1, 13)}
    values = dict(seen)
    assert torch.equal(values[10], values[12])  # the masks stand still from `stop` on


def test_masks_are_precise_under_half_precision(tmp_path: Path) -> None:
    module, selector = Plain(tiny_lm(), optimizer=adam), lp.HardConcreteSelector(stop=4, **EVERYTHING)
    cut = lp.StructuredCut(at=5)
    dtypes = Spy(lambda *_: {v.dtype for v in selector.state_dict().get("masks", {"logits": {}})["logits"].values()})
    fit(module, [dtypes, selector, cut], batches(4), max_steps=6, precision="bf16-true", default_root_dir=tmp_path)
    assert dtypes.seen[:4] == [{torch.float32}] * 4
    assert next(module.lm.parameters()).dtype == torch.bfloat16
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=0.05)


def logits_after(plugins: Any, hold: bool, tmp_path: Path) -> list[Tensor]:
    selector = lp.HardConcreteSelector(stop=9, channels=24, hidden=20, hold_weights=hold)
    spy = Spy(lambda *_: torch.cat([v.flatten() for v in selector.state_dict()["masks"]["logits"].values()]))
    fit(Plain(), [spy, selector], batches(4), max_steps=6, plugins=[plugins], default_root_dir=tmp_path)
    return spy.seen


@pytest.mark.parametrize("hold", [True, False])
def test_masks_learn_as_without_a_loss_scale(hold: bool, tmp_path: Path) -> None:
    scaled, plain = (logits_after(p, hold, tmp_path) for p in (changing_scale(), fp16(enabled=False)))
    assert not torch.equal(plain[-1], plain[0])
    assert (torch.stack(scaled) - torch.stack(plain)).abs().mean() < 0.02


def test_accumulated_batches_have_the_gradient_of_each(tmp_path: Path) -> None:
    """By hand: the mean over the batches of the loss's gradient through the masks that each drew, and the penalty's."""
    selector = lp.HardConcreteSelector(stop=40, hidden=20)
    module, data = Plain(), batches(2)
    expected = torch.zeros(32)
    lm = copy.deepcopy(module.lm)
    taken: list[Tensor] = []
    learn = selector.optimizer_step

    def look() -> None:
        selector._collect()
        masks = selector._masks
        assert masks is not None
        gradient = masks.logits["hidden"].grad
        assert gradient is not None
        taken.append(gradient.clone())
        learn()

    selector.optimizer_step = look  # type: ignore[method-assign]
    fit(module, [selector], data, max_steps=1, accumulate_grad_batches=2, default_root_dir=tmp_path)
    shape = anatomy_of(lm).shape
    masks = MaskSet(shape, Shape(**{**vars(shape), "hidden": 20}), torch.device("cpu"))
    for number, batch in enumerate(data):
        units = UnitValues(anatomy_of(lm), masks.sampled(0, number))
        loss = lm(**batch, use_cache=False).loss
        expected += torch.autograd.grad(loss, masks.logits["hidden"])[0] / 2
        units.remove()
    torch.testing.assert_close(taken[0], expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_learn_the_same(reentrant: bool, tmp_path: Path) -> None:
    def learned(checkpointing: bool) -> Tensor:
        module, selector = Plain(), lp.HardConcreteSelector(stop=9, **EVERYTHING)
        if checkpointing:
            module.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
        spy = Spy(lambda *_: torch.cat([v.flatten() for v in selector.state_dict()["masks"]["logits"].values()]))
        fit(module, [spy, selector], batches(4), max_steps=4, default_root_dir=tmp_path)
        return spy.seen[-1]

    torch.testing.assert_close(learned(True), learned(False), rtol=0, atol=1e-3)


STEPS, STOP, CUT = 6, 2, 4


def run(folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    module = Plain(tiny_lm("llama_tied"), optimizer=adam)
    selector, cut = lp.HardConcreteSelector(stop=STOP, **EVERYTHING), lp.StructuredCut(at=CUT)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_for([cut, selector, saver], STEPS, enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(module, Shuffled(5), batches(1), ckpt_path=checkpoint, weights_only=True)
    assert (folder / "masks.png").exists()
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "metrics": cut.metrics,
        "selector": selector.state_dict(),
    }


def test_resumed_anywhere_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole")
    assert expected["metrics"]["after"]["val/loss"] == pytest.approx(
        expected["metrics"]["before"]["val/loss"], rel=1e-5
    )
    for step in (1, STOP, STOP + 1, CUT):
        torch.manual_seed(step)
        actual = run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert differences(expected, actual) == [], step


def test_with_other_selectors_and_regularizers(tmp_path: Path) -> None:
    module, cut = Plain(tiny_lm("llama_tied"), optimizer=adam), lp.StructuredCut(at=8)
    parts = [
        lp.BlockInfluenceSelector(drop=2, stop=2),
        lp.HardConcreteSelector(stop=5, channels=20, hidden=24),
        lp.GateAnnealing(),
        lp.GroupNormPenalty(1.0),
        lp.DifferencePenalty(0.1),
        cut,
    ]
    fit(module, parts, batches(8), max_steps=9, default_root_dir=tmp_path)
    assert anatomy_of(module.lm).shape == Shape(layers=4, hidden=24, heads=4, kv_groups=2, head_dim=8, channels=20)
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_regularizers_find_what_is_closed_empty_already(tmp_path: Path) -> None:
    """Annealing and the penalty have nothing left to do, on layers either, and do no harm."""
    module, cut = Plain(tiny_lm("llama_tied"), optimizer=adam), lp.StructuredCut(at=8)
    parts = [lp.HardConcreteSelector(stop=5, **EVERYTHING), lp.GateAnnealing(), lp.DifferencePenalty(0.1), cut]
    fit(module, parts, batches(8), max_steps=9, default_root_dir=tmp_path)
    assert anatomy_of(module.lm).shape == SHAPE
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert hooks(module.lm) == 0


def test_two_cycles(tmp_path: Path) -> None:
    module = Plain(tiny_lm("llama_tied"), optimizer=adam)
    first, second = lp.HardConcreteSelector(stop=3, channels=24), lp.HardConcreteSelector(stop=8, start=5, channels=16)
    cuts = [lp.StructuredCut(at=4), lp.StructuredCut(at=9)]
    fit(module, [first, second, *cuts], batches(8), max_steps=10, default_root_dir=tmp_path)
    assert anatomy_of(module.lm).shape.channels == 16
    assert {path.name for path in tmp_path.glob("*.png")} == {"masks-0.png", "masks-5.png"}
    assert first.target_sparsity > second.target_sparsity > 0


def test_without_a_cut_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    module, selector = Plain(), lp.HardConcreteSelector(stop=3, hidden=24)
    fit(module, [selector], batches(4), max_steps=4, default_root_dir=tmp_path)
    assert selector.plan is not None
    assert selector.plan.shape.hidden == 24
    assert hooks(module.lm) == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "selects nothing"),
    "all": ({"hidden": 32}, "removes nothing"),
    "too many": ({"layers": 7}, "layers is 7"),
    "ratio": ({"layers": 1.5}, "between 0 and 1"),
    "lr": ({"hidden": 24, "lr": 0.0}, "lr is 0.0"),
    "multipliers": ({"hidden": 24, "multiplier_lr": -1.0}, "multiplier_lr is -1.0"),
    "warm-up": ({"hidden": 24, "warmup": 1.5}, "warmup is 1.5"),
    "seed": ({"hidden": 24, "seed": -1}, "seed is -1"),
    "window": ({"hidden": 24, "stop": 0}, "opens at step 0"),
    "both": ({"hidden": 24, "parameters": 0.5}, "leave out either"),
    "structures alone": ({"hidden": 24, "structures": ["hidden"]}, "without `parameters`"),
    "no such structure": ({"parameters": 0.5, "structures": ["experts"]}, "can shrink in"),
    "no structure": ({"parameters": 0.5, "structures": []}, "can shrink in"),
    "large budget": ({"parameters": 10**9}, "whole number below"),
    "small budget": ({"parameters": 10}, "at the least"),
    "no ratio": ({"parameters": 1.5}, "whole number below"),
    "multiple": ({"parameters": 0.5, "multiple_of": 0}, "multiple_of is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str) -> None:
    settings, said = BAD[case]
    module, cut = Plain(tiny_lm("llama_tied")), lp.StructuredCut(at=9)
    with pytest.raises(lp.ConfigError, match=said):
        fit(module, [lp.HardConcreteSelector(**({"stop": 8} | settings)), cut], batches(2), max_steps=9)


def test_an_optimizer_that_cannot_be_sliced_is_refused() -> None:
    module = Plain(optimizer=torch.optim.Adafactor)
    with pytest.raises(lp.ConfigError, match="Adafactor"):
        fit(module, [lp.HardConcreteSelector(stop=2, hidden=24), lp.StructuredCut(at=3)], batches(2), max_steps=4)


def test_expected_share_of_parameters(tmp_path: Path) -> None:
    lm = tiny_lm("llama_tied")
    anatomy = anatomy_of(lm)
    selector, before = lp.HardConcreteSelector(stop=5, **EVERYTHING), anatomy.num_parameters
    spy = Spy(lambda *_: selector.target_sparsity)
    fit(Plain(lm), [spy, selector], batches(4), max_steps=5, default_root_dir=tmp_path)
    assert selector.plan is not None
    assert selector.sparsity == selector.target_sparsity == spy.seen[0]
    assert selector.sparsity == pytest.approx(1 - resulting_parameters(anatomy, selector.plan) / before)


def test_left_padded_batches_are_computed_as_after_the_cut(tmp_path: Path) -> None:
    module, selector = Plain(tiny_lm("qwen2"), optimizer=adam), lp.HardConcreteSelector(stop=4, **EVERYTHING)
    spy = Spy(lambda trainer, m: logits_of(m.lm, left_padded()), "on_train_batch_start")
    after = Spy(lambda trainer, m: logits_of(m.lm, left_padded()), "on_fit_end")
    frozen = Plain(module.lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(frozen, [selector, spy, lp.StructuredCut(at=6), after], batches(4), max_steps=6, default_root_dir=tmp_path)
    assert_same(spy.seen[-1], after.seen[-1], 1e-5)
