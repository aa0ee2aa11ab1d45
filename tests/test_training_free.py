"""A module that returns no optimizer: what is selected is cut and exported, and nothing else moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightprune import (
    ActivationUnitSelector,
    BlockInfluenceSelector,
    ConfigError,
    DifferencePenalty,
    ExportHF,
    GateAnnealing,
    GreedyPerplexitySelector,
    GroupNormPenalty,
    HardConcreteSelector,
    LayerGateSelector,
    LoRARecovery,
    MagnitudeUnitSelector,
    ProximalGroupLasso,
    RandomSelector,
    RandomUnitSelector,
    Recovery,
    StructuredCut,
    TaylorUnitSelector,
)
from lightprune.anatomy import anatomy_of
from lightprune.surgery import cut_model
from tests.families import tiny_lm
from tests.logits import assert_same, logits_of
from tests.training import Batch, Plain, assert_equal, batches, fit, trainer_for, weights


class Untrained(Plain):
    def configure_optimizers(self) -> None:
        return None


class NoStep(Untrained):
    """Fails the test if training begins."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("training began")


SELECTORS: dict[str, Callable[[], Any]] = {
    "random layers": lambda: RandomSelector(drop=2),
    "block influence": lambda: BlockInfluenceSelector(drop=2, stop=3),
    "perplexity": lambda: GreedyPerplexitySelector(drop=2, stop=3),
    "layer gates": lambda: LayerGateSelector(drop=2, rounds=1, steps_per_round=3),
    "moving layer gates": lambda: LayerGateSelector(drop=2, rounds=1, steps_per_round=3, hold_weights=False),
    "random units": lambda: RandomUnitSelector(channels=32),
    "magnitude": lambda: MagnitudeUnitSelector(channels=32, hidden=24),
    "activation": lambda: ActivationUnitSelector(channels=32, kv_groups=1, multiple_of=1, stop=3),
    "taylor": lambda: TaylorUnitSelector(channels=32, kv_groups=1, multiple_of=1, stop=3),
}


@pytest.mark.filterwarnings("ignore:.*no multiple of 64", "ignore:.*no optimizer")
@pytest.mark.parametrize("name", SELECTORS)
def test_what_is_selected_is_cut_and_exported(name: str, tmp_path: Path) -> None:
    """The same as the plan executed on the model as it was."""
    selector, cut = SELECTORS[name](), StructuredCut(at=3, validate=False)
    trainer = fit(Untrained(), [selector, cut, ExportHF(str(tmp_path / "out"))], batches(4), 4)
    assert trainer.global_step == 4
    expected = tiny_lm()
    cut_model(anatomy_of(expected), selector.plan)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(logits_of(exported, batches(1)[0]), logits_of(expected, batches(1)[0]))


@pytest.mark.filterwarnings("ignore:.*no multiple of 64", "ignore:.*no optimizer")
def test_masks_are_learned_all_the_same(tmp_path: Path) -> None:
    selector = HardConcreteSelector(channels=32, stop=4)
    module = Untrained()
    fit(module, [selector, StructuredCut(at=4, validate=False)], batches(5), 5, default_root_dir=tmp_path)
    assert module.lm.config.intermediate_size == 32
    logits = torch.tensor(selector.plan.provenance["logits"]["channels"])  # type: ignore[union-attr]
    assert logits.unique().numel() > 1


@pytest.mark.filterwarnings("ignore:.*no multiple of 64", "ignore:.*no optimizer")
def test_it_goes_on_from_a_checkpoint_after_the_cut(tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [MagnitudeUnitSelector(channels=32), StructuredCut(at=2, validate=False)]

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module, again = Untrained(), Untrained()
    fit(module, [*parts(), saver], batches(4), 4, enable_checkpointing=True)
    trainer = trainer_for(parts(), 4)
    trainer.fit(again, batches(4), batches(1), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert trainer.global_step == 4
    assert_equal(weights(again), weights(module))


@pytest.mark.filterwarnings("ignore:.*no optimizer")
@pytest.mark.parametrize(
    "part",
    [
        lambda: DifferencePenalty(),
        lambda: GateAnnealing(),
        lambda: GroupNormPenalty(),
        lambda: ProximalGroupLasso(),
        lambda: Recovery(lr=1e-3),
        lambda: LoRARecovery(r=2),
    ],
    ids=["difference", "annealing", "group norm", "proximal", "recovery", "lora"],
)
def test_what_acts_through_training_is_refused(part: Any) -> None:
    part = part()
    if isinstance(part, LoRARecovery):
        pytest.importorskip("peft")
    units = isinstance(part, (GroupNormPenalty, ProximalGroupLasso))
    selector = RandomUnitSelector(hidden=24) if units else RandomSelector(drop=1)
    with pytest.raises(ConfigError, match=rf"^{type(part).__name__} acts on weights that train, and NoStep\.") as error:
        fit(NoStep(), [selector, part, StructuredCut(at=3)], batches(4), 4)
    assert str(error.value).endswith("out of trainer.callbacks.")
