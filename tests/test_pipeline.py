"""What binds the parts: their order, holding weights, and a validation loop from inside the fit."""

from typing import Any

import pytest
import torch
from torch import nn

from lightprune import (
    BlockInfluenceSelector,
    ConfigError,
    DifferencePenalty,
    GateAnnealing,
    LayerGateSelector,
    RandomSelector,
    Recovery,
    StructuredCut,
)
from lightprune.integrations.lightning import find_causal_lm, run_validation
from lightprune.pipeline import Pipeline
from tests.families import tiny_lm
from tests.training import Plain, Spy, assert_equal, batches, fit, weights


def parts() -> list[Any]:
    return [
        LayerGateSelector(drop=2, steps_per_round=2),
        DifferencePenalty(strength=0.1),
        GateAnnealing(),
        StructuredCut(at=7),
        Recovery(lr=1e-2),
    ]


def test_the_order_of_callbacks_does_not_matter() -> None:
    results = []
    for reorder in (lambda p: p, lambda p: p[::-1], lambda p: [p[3], p[1], p[4], p[0], p[2]]):
        module = Plain()
        fit(module, reorder(parts()), batches(9), max_steps=9)
        results.append(weights(module))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_before_the_selection_begins_or_without_a_penalty(accumulate: int) -> None:
    """Callbacks whose time has not come leave the run bit for bit what it is without them."""
    plain, pruned = Plain(), Plain()
    fit(plain, [], batches(8), max_steps=4, accumulate_grad_batches=accumulate)
    late = [BlockInfluenceSelector(drop=1, start=20, stop=22), DifferencePenalty(stop=30)]
    fit(pruned, late, batches(8), max_steps=4, accumulate_grad_batches=accumulate)
    assert_equal(weights(plain), weights(pruned))


def test_a_penalty_of_strength_zero_changes_nothing() -> None:
    plain, pruned = Plain(), Plain()
    fit(plain, [], batches(4), max_steps=4)
    fit(pruned, [RandomSelector(drop=2), DifferencePenalty(strength=0.0, stop=4)], batches(4), max_steps=4)
    assert_equal(weights(plain), weights(pruned))


def test_held_weights_cost_no_gradient() -> None:
    def look(trainer: Any, module: Any) -> tuple[bool, bool]:
        held = not any(p.requires_grad for p in module.parameters())
        return held, all(p.grad is None for p in module.parameters())

    spy = Spy(look)
    fit(Plain(), [spy, LayerGateSelector(drop=1, steps_per_round=3)], batches(3), max_steps=3)
    assert spy.seen == [(True, True)] * 3


class TwoSteps(Plain):
    """Two optimizer steps a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_a_batch_of_two_steps_may_pass_a_whole_window() -> None:
    module, cut = TwoSteps(), StructuredCut(at=4)
    fit(module, [BlockInfluenceSelector(drop=2, stop=3), GateAnnealing(), cut], batches(4), max_steps=8)
    assert cut.done
    assert len(module.lm.model.layers) == 4


def test_global_step_and_schedulers_count_held_steps_without_warnings(recwarn: Any) -> None:
    spy = Spy(lambda trainer, _: (trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
    module = Plain(scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)))
    fit(module, [spy, BlockInfluenceSelector(drop=1, stop=2)], batches(4), max_steps=4)
    assert spy.seen == [(s, pytest.approx(0.05 / (1 + s))) for s in range(1, 5)]
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_run_validation_gives_what_the_loop_logs() -> None:
    seen = []

    class Validates(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(run_validation(self.trainer))

    module = Validates(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    expected = tiny_lm().eval()(**batches(1)[0], use_cache=False).loss.item()
    fit(module, [], batches(2), max_steps=2)
    assert seen == [{"val/loss": pytest.approx(expected, rel=1e-5)}] * 2


def test_plan_and_parts_are_there_after_the_fit() -> None:
    callbacks = parts()
    trainer = fit(Plain(), callbacks, batches(9), max_steps=9)
    pipeline = Pipeline.of(trainer)
    assert pipeline is not None
    assert pipeline.plan is callbacks[0].plan
    assert pipeline.cut is callbacks[3]
    assert pipeline.phase == "recover"
    assert pipeline.lm.config.num_hidden_layers == pipeline.anatomy.num_layers == 4


def test_find_causal_lm() -> None:
    module = nn.Module()
    module.add_module("a", nn.ModuleDict({"b": tiny_lm()}))
    path, lm = find_causal_lm(module)
    assert path == "a.b"
    assert lm is module.get_submodule("a.b")
    assert find_causal_lm(lm) == ("", lm)
    backbone = nn.Module()
    backbone.add_module("model", lm.model)  # a model without a head is no causal LM
    with pytest.raises(ConfigError, match="holds no Hugging Face causal LM"):
        find_causal_lm(backbone)
    module.add_module("teacher", tiny_lm())
    with pytest.raises(ConfigError, match=r"holds 2 .* at a.b and teacher"):
        find_causal_lm(module)
    module.pruned_model = "teacher"
    assert find_causal_lm(module)[0] == "teacher"
