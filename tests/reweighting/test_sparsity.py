from pathlib import Path

import lightning as L
import pytest

import lightprune as lp
from lightprune.integrations.zero_params import parameter_count
from lightprune.pipeline import PruningCallback, Stage
from lightprune.reweighting.sparsity import sparsity_of
from tests.reweighting.runs import Stranger, fit, write_texts
from tests.training import Spy


class Masks(PruningCallback):
    """A part that says what its masks remove: ever more up to its target, and nothing once that is cut."""

    stage = Stage.REGULARIZE
    target_sparsity = 0.15

    @property
    def sparsity(self) -> float:
        cut = self.pipeline.cut
        assert cut is not None
        return 0.0 if cut.done else self.target_sparsity * min(self.pipeline.step, 4) / 4


@pytest.mark.parametrize("masks", [False, True])
def test_masks_and_cuts_are_told(tmp_path: Path, masks: bool) -> None:
    module = Stranger(layers=6)
    before = parameter_count(module)
    assert before == sum(p.numel() for p in module.parameters())

    def look(trainer: L.Trainer, seen: L.LightningModule) -> tuple[float, float]:
        return sparsity_of(trainer, parameter_count(seen), before)

    spy = Spy(look, "on_before_optimizer_step")
    parts = [*([Masks()] if masks else []), lp.MagnitudeUnitSelector(channels=24), lp.StructuredCut(at=5)]
    fit(write_texts(tmp_path), [spy, *parts], 8, module)
    cut = 1 - parameter_count(module) / before
    assert cut > 0.15
    now, final = ([pair[i] for pair in spy.seen] for i in range(2))
    assert now == pytest.approx([*([0.15 * s / 4 for s in range(5)] if masks else 5 * [0.0]), cut, cut, cut])
    assert final == pytest.approx([*(5 * [0.15 if masks else 0.0]), cut, cut, cut])


def test_masks_of_a_second_cut_count_in_what_the_first_one_left(tmp_path: Path) -> None:
    module = Stranger(layers=4)
    before = parameter_count(module)

    def look(trainer: L.Trainer, seen: L.LightningModule) -> tuple[float, ...]:
        return 1 - parameter_count(seen) / before, *sparsity_of(trainer, parameter_count(seen), before)

    spy = Spy(look, "on_before_optimizer_step")
    masks = [lp.HardConcreteSelector(stop=3, channels=24), lp.HardConcreteSelector(stop=8, start=5, channels=12)]
    fit(write_texts(tmp_path), [spy, *masks, lp.StructuredCut(at=4), lp.StructuredCut(at=9)], 10, module)
    cut, now, final = zip(*spy.seen, strict=True)
    assert 0 < cut[4] < cut[9]
    assert final == pytest.approx(10 * [cut[9]])
    assert now[3] == pytest.approx(cut[4])  # decided
    assert cut[4] < now[7] < cut[9]
    assert now[8:] == pytest.approx(2 * [cut[9]])


def test_without_pruning_it_is_nothing(tmp_path: Path) -> None:
    trainer = fit(write_texts(tmp_path), [], 1, Stranger())
    assert sparsity_of(trainer, 100, 100) == (0.0, 0.0)
