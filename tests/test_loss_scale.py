"""fp16 with a loss scale: gates and penalties are what they are without one, and overflow skips a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightprune import DifferencePenalty, HardConcreteSelector, LayerGateSelector, RandomSelector
from tests.training import Batch, Plain, Spy, assert_close, batches, fit, gradients, weights


def fp16(**scaler: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))


def changing_scale() -> MixedPrecision:
    """Adam does not see a constant scale: this one grows at every step."""
    return fp16(init_scale=4.0, growth_factor=4.0, growth_interval=1)


def learned_gates(plugin: MixedPrecision, hold: bool, module: Plain | None = None) -> list[Tensor]:
    """The gates after each step."""
    selector = LayerGateSelector(drop=1, steps_per_round=5, l1=0.02, hold_weights=hold)
    spy = Spy(lambda *_: selector.state_dict()["gates"])
    fit(module or Plain(), [spy, selector], batches(4), max_steps=4, plugins=[plugin])
    return spy.seen


@pytest.mark.parametrize("hold", [True, False])
def test_gates_learn_as_without_a_scale(hold: bool) -> None:
    actual, expected = learned_gates(changing_scale(), hold), learned_gates(fp16(enabled=False), hold)
    assert not torch.equal(expected[-1], expected[0])
    for scaled, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-3)


def test_the_penaltys_gradient_is_unscaled_too() -> None:
    def gradient(plugin: MixedPrecision) -> dict[str, Tensor]:
        spy = Spy(lambda trainer, m: gradients(m), "on_before_optimizer_step")
        parts = [RandomSelector(drop=2), DifferencePenalty(strength=3.0, stop=4)]
        fit(Plain(), [spy, *parts], batches(1), max_steps=1, plugins=[plugin])
        return spy.seen[0]

    assert_close(gradient(fp16(init_scale=1024.0)), gradient(fp16(enabled=False)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("hold", [True, False])
def test_an_overflow_skips_the_gates_and_lowers_the_scale(hold: bool) -> None:
    plugin, module = fp16(init_scale=2.0**60), Plain()
    before = weights(module)
    assert all(torch.equal(gates, torch.ones(6)) for gates in learned_gates(plugin, hold, module))
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**56
    assert_close(weights(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("hold", [True, False])
def test_two_parts_that_learn_adjust_the_scale_once(hold: bool, tmp_path: Path) -> None:
    plugin = changing_scale()
    assert plugin.scaler is not None
    scales = Spy(lambda *_: plugin.scaler.get_scale())
    parts = [
        LayerGateSelector(drop=1, steps_per_round=5, hold_weights=hold),
        HardConcreteSelector(channels=32, stop=5, hold_weights=hold),
    ]
    fit(Plain(), [scales, *parts], batches(4), max_steps=4, plugins=[plugin], default_root_dir=tmp_path)
    assert scales.seen == [16.0, 64.0, 256.0, 1024.0]


class Skips(Plain):
    """Skips every other batch, without and with a forward pass."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == 0:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("hold", [True, False])
def test_a_skipped_batch_moves_no_gate(scaled: bool, hold: bool) -> None:
    first, second, third, fourth = learned_gates(changing_scale() if scaled else fp16(enabled=False), hold, Skips())
    assert torch.equal(first, torch.ones(6))
    assert not torch.equal(second, first)
    assert torch.equal(third, second)
    assert not torch.equal(fourth, third)


@pytest.mark.parametrize("hold", [True, False])
def test_a_skipped_batch_without_any_scaler(hold: bool) -> None:
    selector = LayerGateSelector(drop=1, steps_per_round=4, hold_weights=hold)
    fit(Skips(), [selector], batches(4), max_steps=4)
    assert selector.plan is not None
