"""Scales of what stays: learned while the weights stand still, and folded at the cut, which then changes nothing."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import lightprune as lp
from lightprune import ConfigError, ScaleCalibration, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.surgery import cut_model
from tests.families import FAMILIES, combinations_of, random_plan, tiny_lm
from tests.regularizers.by_hand import from_file
from tests.training import Plain, Spy, assert_equal, batches, fit, weights


def structures_of(name: str) -> list[tuple[str, ...]]:
    """Layers alone, and all that the family can lose together."""
    return [("layers",), max(combinations_of(tiny_lm(name)), key=len)]


@pytest.mark.parametrize(("name", "structures"), [(name, s) for name in FAMILIES for s in structures_of(name)])
def test_no_jump_at_the_cut(name: str, structures: tuple[str, ...], tmp_path: Any) -> None:
    lm = tiny_lm(name)
    plan = random_plan(anatomy_of(lm), structures, random.Random(1))
    cut, part = StructuredCut(at=4), ScaleCalibration(lr=0.2)
    moved = Spy(lambda *_: float((part._scales - 1).abs().max()), hook="on_before_zero_grad")
    fit(Plain(lm), [from_file(plan, tmp_path), part, cut, moved], batches(5), max_steps=5)
    assert max(moved.seen) > 0.1
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-4)


def scaled_by_hand(lr: float, plan: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """After one step of Adam, which begins with lr x the sign; for a scale s of W and b, dL/ds = <dW, W> + <db, b>."""
    lm = tiny_lm("llama_tied")
    cut_model(anatomy_of(lm), plan)
    lm(**batch, use_cache=False).loss.backward()
    with torch.no_grad():
        for layer in lm.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                slope = sum((p.grad * p).sum() for p in writer.parameters())
                for parameter in writer.parameters():
                    parameter *= 1 - lr * torch.sign(torch.as_tensor(slope))
    return {name: p.detach() for name, p in lm.named_parameters()}


def test_one_step_is_that_of_the_gradient_with_respect_to_a_scale(tmp_path: Any) -> None:
    lm = tiny_lm("llama_tied")
    plan = random_plan(anatomy_of(lm), max(combinations_of(lm), key=len), random.Random(2))
    (batch,) = batches(1)
    fit(Plain(lm), [from_file(plan, tmp_path), ScaleCalibration(lr=0.1), StructuredCut(at=1)], [batch], max_steps=1)
    expected = scaled_by_hand(0.1, plan, batch)
    torch.testing.assert_close({n: p.detach() for n, p in lm.named_parameters()}, expected, rtol=1e-4, atol=1e-5)


def test_weights_stand_still_while_scales_learn_and_scales_while_weights_do(tmp_path: Any) -> None:
    lm = tiny_lm("llama_tied")
    plan = random_plan(anatomy_of(lm), ("layers",), random.Random(1))
    part = ScaleCalibration(stop=2)
    module = Plain(lm)
    seen = Spy(lambda _, m: (weights(m), part._scales.detach().clone()))
    fit(module, [from_file(plan, tmp_path), part, StructuredCut(at=4), seen], batches(4), max_steps=4)
    start = weights(Plain(tiny_lm("llama_tied")))
    (one, first), (two, second), (three, third), _ = seen.seen
    assert_equal(one, start)
    assert_equal(two, start)
    assert any(not torch.equal(three[name], start[name]) for name in start)
    assert not torch.equal(first, second)
    assert torch.equal(second, third)


def test_beside_a_teacher_they_learn_from_it(tmp_path: Any) -> None:
    def run(*others: Any) -> dict[str, Tensor]:
        lm = tiny_lm("llama_tied")
        plan = random_plan(anatomy_of(lm), ("layers",), random.Random(1))
        parts = [from_file(plan, tmp_path), ScaleCalibration(lr=0.1), StructuredCut(at=3), *others]
        module = Plain(lm)
        fit(module, parts, batches(3), max_steps=3)
        return weights(module)

    taught, alone = run(lp.Distillation()), run()
    assert any(not torch.equal(taught[name], alone[name]) for name in alone)


def test_what_cannot_be_is_refused(tmp_path: Any) -> None:
    lm = tiny_lm("llama_tied")
    selector = from_file(random_plan(anatomy_of(lm), ("layers",), random.Random(1)), tmp_path)
    with pytest.raises(ConfigError, match=r"calibrates what a cut leaves"):
        fit(Plain(lm), [selector, ScaleCalibration(stop=2)], batches(2), max_steps=2)
    selector = from_file(random_plan(anatomy_of(lm), ("layers",), random.Random(1)), tmp_path)
    parts = [selector, ScaleCalibration(), lp.LeastSquaresCompensation(batches=2), StructuredCut(at=2)]
    with pytest.raises(ConfigError, match="leave it or LeastSquaresCompensation out"):
        fit(Plain(lm), parts, batches(2), max_steps=2)
    with pytest.raises(ConfigError, match=r"ScaleCalibration\.lr"):
        fit(Plain(lm), [selector, ScaleCalibration(lr=0), StructuredCut(at=2)], batches(2), max_steps=2)
