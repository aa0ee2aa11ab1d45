"""`loss.backward()` in manual optimization goes past the parts: refused in the first batch, where a part would act."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightprune as lp
from lightprune import ConfigError
from tests.training import Batch, Plain, assert_equal, batches, fit, weights

REFUSED = r"{name} calls loss.backward\(\), of which .*{part}.* would see nothing: call self.manual_backward\(loss\)"
PARTS: dict[str, Callable[[], list[Callback]]] = {
    "DifferencePenalty": lambda: [lp.RandomSelector(drop=2, start=2), lp.DifferencePenalty(stop=4)],
    "GroupNormPenalty": lambda: [lp.RandomUnitSelector(channels=32), lp.GroupNormPenalty(stop=4)],
    "LayerGateSelector": lambda: [lp.LayerGateSelector(drop=1, steps_per_round=2)],
    "LayerGateSelector beside weights": lambda: [lp.LayerGateSelector(drop=1, steps_per_round=2, hold_weights=False)],
    "HardConcreteSelector": lambda: [lp.HardConcreteSelector(stop=4, channels=32)],
    "TaylorUnitSelector": lambda: [lp.TaylorUnitSelector(channels=32, stop=2)],
    "BlockInfluenceSelector": lambda: [lp.BlockInfluenceSelector(drop=2, stop=2)],
    "BlockInfluenceSelector later": lambda: [lp.BlockInfluenceSelector(drop=2, start=2, stop=4)],
    "ActivationUnitSelector": lambda: [lp.ActivationUnitSelector(channels=32, stop=2)],
    "GreedyPerplexitySelector": lambda: [lp.GreedyPerplexitySelector(drop=2, stop=2)],
}


class Raw(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.probe = nn.Linear(2, 1)

    def loss(self, batch: Batch) -> Tensor:
        return super().training_step(batch, 0)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class InClosure(Raw):
    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()

        def closure() -> None:
            self.loss(batch).backward()

        optimizer.step(closure=closure)


class Accumulated(Raw):
    """Two batches a step, of which only the first goes through Lightning."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        if batch_idx % 2 == 0:
            self.manual_backward(loss)
            return
        loss.backward()
        self.optimizers().step()
        self.optimizers().zero_grad()


class NoStep(Raw):
    """Steps an optimizer that Lightning does not see."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.loss(batch).backward()


@pytest.mark.parametrize("name", PARTS)
def test_refused_before_a_weight_moves(name: str) -> None:
    module = Raw()
    before = weights(module)
    with pytest.raises(ConfigError, match=REFUSED.format(name="Raw", part=name.split()[0])):
        fit(module, PARTS[name](), batches(6), max_steps=6)
    assert_equal(weights(module), before)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("kind", [InClosure, Accumulated, NoStep])
def test_refused_however_it_is_called(kind: type[Raw]) -> None:
    module = kind()
    before = weights(module)
    with pytest.raises(ConfigError, match=REFUSED.format(name=kind.__name__, part="DifferencePenalty")):
        fit(module, PARTS["DifferencePenalty"](), batches(6), max_steps=6)
    assert_equal(weights(module), before)


def test_held_weights_of_another_loss() -> None:
    class Beside(Raw):
        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(self.loss(batch))
            self.probe(torch.ones(2)).sum().backward()
            self.optimizers().step()

    with pytest.raises(ConfigError, match=REFUSED.format(name="Beside", part="BlockInfluenceSelector")):
        fit(Beside(), PARTS["BlockInfluenceSelector"](), batches(3), max_steps=3)


def test_parts_that_need_no_backward_pass_work_with_any() -> None:
    cut = lp.StructuredCut(at=4)
    parts = [lp.RandomSelector(drop=1), lp.RandomUnitSelector(channels=32), lp.ProximalGroupLasso(), lp.GateAnnealing()]
    module = Raw()
    before = weights(module)
    fit(module, [*parts, cut], batches(6), max_steps=6)
    assert cut.done
    assert not torch.equal(weights(module)["lm.model.embed_tokens.weight"], before["lm.model.embed_tokens.weight"])


class Careful(Raw):
    """Gradients of its own beside the loss's, a batch that it skips, two passes a step, and a pass for the log."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if batch_idx == 1:
            return
        torch.autograd.grad(self.loss(batch), self.lm.get_input_embeddings().weight, allow_unused=True)
        self.manual_backward(loss / 2)
        self.manual_backward(self.loss(batch) / 2)
        self.log("again", self.loss(batch))
        optimizer.step()


def test_what_goes_through_lightning_is_not_refused() -> None:
    cut = lp.StructuredCut(at=4)
    fit(Careful(), [*PARTS["GroupNormPenalty"](), cut], batches(8), max_steps=6)
    assert cut.done


def test_a_skipped_batch_leaves_no_penalty_behind() -> None:
    """The next batch trains another loss, which has nothing to do with the LM."""

    class Skips(Raw):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            if batch_idx == 0:
                self.loss(batch)
                return
            self.manual_backward(self.probe(torch.ones(2)).sum())
            optimizer.step()

    module = Skips()
    before = copy.deepcopy(module.lm.state_dict())
    parts = [lp.RandomUnitSelector(channels=32), lp.GroupNormPenalty(stop=4)]
    fit(module, parts, batches(2), max_steps=1)
    assert_equal(dict(module.lm.state_dict()), before)
