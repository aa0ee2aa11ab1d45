"""Gate annealing: its schedule, seen from outside, and the cut that it makes free of any jump."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightprune import GateAnnealing, PlanFromFile, PruningPlan, RandomSelector, StructuredCut
from lightprune.anatomy import anatomy_of
from tests.families import FAMILIES, tiny_lm
from tests.training import Plain, Spy, assert_close, batches, fit, weights

DROP = [1, 4]


class Watched(Plain):
    """Measures, in each training step, by how much the layers' branches reach the residual stream."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.alphas: list[dict[int, float]] = []
        self.computed: list[set[int]] = []
        layers = anatomy_of(self.lm).layers
        self.entering: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda m, i, index=index: self.entering.update({index: i[0]}))
            layer.mlp.register_forward_hook(lambda *_, index=index: self.now.add(index))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        own: dict[int, Tensor] = {}
        self.now: set[int] = set()
        layers = anatomy_of(self.lm).layers
        handles = [layers[i].register_forward_hook(lambda m, a, o, i=i: own.update({i: o}), prepend=True) for i in DROP]
        loss = super().training_step(batch, batch_idx)
        for handle in handles:
            handle.remove()
        self.computed.append(self.now)
        seen = {}
        for index in DROP:
            branch = (own[index] - self.entering[index]).detach().flatten()
            moved = (self.entering[index + 1] - self.entering[index]).detach().flatten()
            seen[index] = float(moved @ branch / (branch @ branch)) if branch.any() else 0.0
        self.alphas.append(seen)
        return loss


def plan_of(lm: Any, tmp_path: Any) -> PlanFromFile:
    path = tmp_path / "plan.json"
    PruningPlan.dropping(anatomy_of(lm), DROP).save(path)
    return PlanFromFile(str(path))


LINEAR = [1, 0.75, 0.5, 0.25, 0, 0]
COSINE = [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2, 0, 0]


@pytest.mark.parametrize(
    ("shape", "order", "first", "last"),
    [
        ("linear", "joint", LINEAR, LINEAR),
        ("cosine", "joint", COSINE, COSINE),
        ("linear", "first_to_last", [1, 0.5, 0, 0, 0, 0], [1, 1, 1, 0.5, 0, 0]),
        ("linear", "last_to_first", [1, 1, 1, 0.5, 0, 0], [1, 0.5, 0, 0, 0, 0]),
    ],
)
def test_alpha_follows_its_shape_and_layers_at_zero_are_not_computed(
    shape: Any, order: Any, first: list[float], last: list[float], tmp_path: Any
) -> None:
    """The window goes from step 1 to step 5; its last step trains with alpha = 0, and so does all until the cut."""
    lm = tiny_lm()
    module = Watched(lm)
    annealing = GateAnnealing(shape=shape, order=order, start=1, stop=5)
    fit(module, [plan_of(lm, tmp_path), annealing, StructuredCut(at=6)], batches(6), max_steps=6)
    assert [alphas[1] for alphas in module.alphas] == pytest.approx(first, abs=1e-4)
    assert [alphas[4] for alphas in module.alphas] == pytest.approx(last, abs=1e-4)
    for computed, one, four in zip(module.computed, first, last, strict=True):
        assert computed == {0, 2, 3, 5} | ({1} if one else set()) | ({4} if four else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_jump_at_the_cut(name: str) -> None:
    cut = StructuredCut(at=4)
    callbacks = [RandomSelector(drop=3, seed=1), GateAnnealing(), cut]
    fit(Plain(tiny_lm(name)), callbacks, batches(5), max_steps=5)
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)


def test_accumulation_does_not_hasten_the_ramp(tmp_path: Any) -> None:
    lm = tiny_lm()
    module = Watched(lm)
    parts = [plan_of(lm, tmp_path), GateAnnealing(), StructuredCut(at=4, validate=False)]
    fit(module, parts, batches(8), max_steps=4, accumulate_grad_batches=2)
    expected = [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]
    assert [alphas[1] for alphas in module.alphas] == pytest.approx(expected, abs=1e-4)


def test_layers_of_the_plan_learn_until_they_are_out_and_then_stand_still(tmp_path: Any) -> None:
    lm = tiny_lm()
    module = Plain(lm)
    name = "model.layers.1.mlp.down_proj.weight"
    values = [lm.get_parameter(name).detach().clone()]

    spy = Spy(lambda trainer, m: values.append(m.lm.get_parameter(name).detach().clone()))
    fit(module, [spy, plan_of(lm, tmp_path), GateAnnealing(stop=3), StructuredCut(at=5)], batches(5), max_steps=5)
    moved = [not torch.equal(before, after) for before, after in pairwise(values)]
    assert moved == [True, True, False, False, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Any) -> None:
    """All the way to layers that are left out."""

    def run(checkpointed: bool) -> dict[str, Tensor]:
        lm = tiny_lm()
        if checkpointed:
            lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
            lm.enable_input_require_grads()
        fit(Plain(lm), [plan_of(lm, tmp_path), GateAnnealing(), StructuredCut(at=4)], batches(5), max_steps=5)
        return weights(lm)

    assert_close(run(True), run(False), rtol=1e-4, atol=1e-6)
