"""The group norm penalty against its formula, written out slice by slice."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from lightprune import GroupNormPenalty, PruningPlan, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.importance.groups import Norm
from tests.families import tiny_lm
from tests.regularizers.by_hand import REMOVED, from_file, mean_of, plan_for
from tests.training import Batch, Plain, Spy, assert_close, batches, fit, gradients

STRENGTH = 0.7


def still(lm: PreTrainedModel) -> Plain:
    """A module whose optimizer moves nothing."""
    return Plain(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))


class Scale(Callback):
    """Multiplies all weights after the first step."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 1:
            for parameter in module.parameters():
                parameter *= self.factor


def first_gradients(
    lm: PreTrainedModel, callbacks: list[Any], data: list[Batch], max_steps: int = 1, **kwargs: Any
) -> dict[str, Tensor]:
    spy = Spy(lambda trainer, m: gradients(m), "on_before_optimizer_step")
    fit(still(lm), [spy, *callbacks], data, max_steps, **kwargs)
    return {name.removeprefix("lm."): value for name, value in spy.seen[0].items()}


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_gradient_and_value_are_those_of_the_formula(name: str, norm: Norm, relative: bool, tmp_path: Any) -> None:
    lm, (batch,) = tiny_lm(name), batches(1)
    twin = copy.deepcopy(lm)
    means = [mean_of(name, twin, unit, norm) for unit in REMOVED[name]]
    penalty = STRENGTH * sum(mean / mean.detach() if relative else mean for mean in means)
    (twin(**batch, use_cache=False).loss + penalty).backward()

    part = GroupNormPenalty(STRENGTH, norm=norm, relative=relative, stop=4)
    values = Spy(lambda *_: part.penalty(), "on_before_optimizer_step")
    actual = first_gradients(lm, [values, from_file(plan_for(name, lm), tmp_path), part], [batch])
    assert_close(actual, gradients(twin), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.seen[0], penalty)


def test_accumulation_counts_the_penalty_once(tmp_path: Any) -> None:
    pieces = batches(4)
    whole = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def gradient(data: list[Batch], accumulate: int) -> dict[str, Tensor]:
        lm = tiny_lm()
        parts = [from_file(plan_for("llama_tied", lm), tmp_path), GroupNormPenalty(STRENGTH, stop=4)]
        return first_gradients(lm, parts, data, accumulate_grad_batches=accumulate)

    assert_close(gradient(pieces, 4), gradient([whole], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ramp", "expected"), [("constant", [0, 1, 1, 1, 1, 1]), ("linear", [0, 0.25, 0.5, 0.75, 1, 1])]
)
def test_strength_follows_its_ramp(ramp: Any, expected: list[float], tmp_path: Any) -> None:
    """In a window from step 1 to step 5, of weights that stand still."""
    lm = tiny_lm()
    mean = mean_of("llama_tied", lm, "channels", "l2").item()
    part = GroupNormPenalty(STRENGTH, ramp=ramp, relative=False, start=1, stop=5)
    spy = Spy(lambda *_: float(part.penalty() or 0), "on_before_optimizer_step")
    selector = from_file(plan_for("llama_tied", lm, "layers", "channels"), tmp_path)
    fit(still(lm), [spy, selector, part, StructuredCut(at=6, validate=False)], batches(6), max_steps=6)
    assert spy.seen == pytest.approx([STRENGTH * mean * share for share in expected], rel=1e-5)


def variant(kind: str) -> PreTrainedModel:
    """A Llama without biases; the same with all hidden dimensions, or all layers, there twice; with larger weights."""
    narrow = tiny_lm("llama", num_layers=2)
    shape = {"wide": {"hidden_size": 64}, "deep": {"num_layers": 4}}.get(kind, {})
    lm = tiny_lm("llama", **({"num_layers": 2} | shape))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            source = narrow.get_parameter(name.replace("layers.2", "layers.0").replace("layers.3", "layers.1"))
            sizes = zip(parameter.shape, source.shape, strict=True)
            parameter.copy_(source.repeat([new // old for new, old in sizes]) * (3 if kind == "large" else 1))
    return lm


def remove_some(lm: PreTrainedModel) -> PruningPlan:
    """Other channels and heads in even and odd layers, and where the width is doubled, each removed dimension twice."""
    anatomy = anatomy_of(lm)
    layers, hidden = range(anatomy.num_layers), range(anatomy.shape.hidden)
    return PruningPlan.keeping(
        anatomy,
        heads=[[0, 2] if layer % 2 else [1, 3] for layer in layers],
        channels=[range(5, 48) if layer % 2 else range(43) for layer in layers],
        hidden=[index for index in hidden if index % 32 not in (1, 8, 21, 30)],
    )


def test_what_a_strength_does_depends_on_no_width_depth_or_scale(tmp_path: Any) -> None:
    """With `relative` it is what each of the three structures adds at first, and half as much at half the weights."""
    for kind in ("narrow", "wide", "deep", "large"):
        lm = variant(kind)
        part = GroupNormPenalty(STRENGTH, stop=4)
        spy = Spy(lambda *_, part=part: float(part.penalty()), "on_before_optimizer_step")
        fit(still(lm), [spy, Scale(0.5), from_file(remove_some(lm), tmp_path), part], batches(2), max_steps=2)
        assert spy.seen == pytest.approx([3 * STRENGTH, 1.5 * STRENGTH], rel=1e-5), kind


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_without_relative_it_still_depends_on_neither_width_nor_depth(norm: Norm, tmp_path: Any) -> None:
    values = {}
    for kind in ("narrow", "wide", "deep", "large"):
        lm = variant(kind)
        part = GroupNormPenalty(STRENGTH, norm=norm, relative=False, stop=4)
        spy = Spy(lambda *_, part=part: float(part.penalty()), "on_before_optimizer_step")
        plan = remove_some(lm)
        if kind == "deep":  # a hidden dimension of a deeper model holds more matrices for each embedding
            plan = PruningPlan.keeping(anatomy_of(lm), heads=plan.kept_heads, channels=plan.kept_channels)
        fit(still(lm), [spy, from_file(plan, tmp_path), part], batches(1), max_steps=1)
        values[kind] = spy.seen[0]
        if kind == "narrow":
            hidden = PruningPlan.keeping(anatomy_of(lm), hidden=plan.kept_hidden)
            alone = GroupNormPenalty(STRENGTH, norm=norm, relative=False, stop=4)
            spy = Spy(lambda *_, alone=alone: float(alone.penalty()), "on_before_optimizer_step")
            fit(still(lm), [spy, from_file(hidden, tmp_path), alone], batches(1), max_steps=1)
            values["hidden"] = spy.seen[0]
    assert values["wide"] == pytest.approx(values["narrow"], rel=1e-5)
    assert values["deep"] == pytest.approx(values["narrow"] - values["hidden"], rel=1e-5)
    assert values["large"] == pytest.approx(3 * values["narrow"], rel=1e-5)


def test_groups_shrink_under_it(tmp_path: Any) -> None:
    means = []
    for strength in (0.0, 100.0):
        lm = tiny_lm()
        module = Plain(lm, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
        parts = [from_file(plan_for("llama_tied", lm), tmp_path), GroupNormPenalty(strength, stop=20)]
        fit(module, parts, batches(20), max_steps=20)
        means.append({unit: mean_of("llama_tied", lm, unit, "l2").item() for unit in REMOVED["llama_tied"]})
    free, penalized = means
    assert all(penalized[unit] < 0.75 * free[unit] for unit in free), means
