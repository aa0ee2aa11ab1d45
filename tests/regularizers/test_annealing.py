"""Gate annealing: its schedule, seen from outside, and the cut that it makes free of any jump."""

import math
import random
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightprune import GateAnnealing, PlanFromFile, PruningPlan, StructuredCut
from lightprune.anatomy import anatomy_of
from tests.families import FAMILIES, combinations_of, random_plan, tiny_lm
from tests.regularizers.by_hand import REMOVED, STAY, from_file, plan_for
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


def factors(entering: Tensor, leaving: Tensor) -> Tensor:
    """By what each of the last dimension's columns was multiplied."""
    before, after = entering.detach().flatten(0, -2), leaving.detach().flatten(0, -2)
    return (before * after).sum(0) / before.square().sum(0)


class Measured(Plain):
    """Measures, in each training step, by what heads, channels and hidden dimensions are multiplied on their way.

    Its hooks are there before any mask's: they see what comes in untouched, and what a projection gets in the end.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[dict[tuple[str, int], Tensor]] = []
        raw: dict[Any, Tensor] = {}

        def watch(module: nn.Module, unit: str, layer: int) -> None:
            module.register_forward_pre_hook(lambda m, i: raw.update({(unit, layer): i[0]}))
            module.register_forward_hook(lambda m, i, o: self.note(unit, layer, raw[unit, layer], i[0]))

        for index, layer in enumerate(self.lm.model.layers):
            watch(layer.self_attn.o_proj, "heads", index)
            watch(layer.mlp.down_proj, "channels", index)
        self.lm.model.embed_tokens.register_forward_hook(lambda m, i, o: raw.update(embedding=o))
        self.lm.model.layers[0].register_forward_pre_hook(lambda m, i: self.note("hidden", 0, raw["embedding"], i[0]))

    def note(self, unit: str, layer: int, entering: Tensor, leaving: Tensor) -> None:
        if self.trainer.training:
            self.steps[-1][unit, layer] = factors(entering, leaving)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append({})
        return super().training_step(batch, batch_idx)


def removed_columns(unit: str, layer: int) -> list[int]:
    indices = [index for place, index in REMOVED["llama_tied"][unit] if place == layer]
    if unit != "heads":
        return indices
    groups = [group for place, group in REMOVED["llama_tied"]["kv_groups"] if place == layer]
    heads = indices + [2 * group + i for group in groups for i in (0, 1)]
    return [8 * head + i for head in heads for i in range(8)]


@pytest.mark.parametrize(
    ("shape", "order", "own"),
    [
        # In each of five steps, alpha of the units of the first, second, ... layer that stays.
        ("linear", "joint", [[0.8] * 5, [0.6] * 5, [0.4] * 5, [0.2] * 5, [0] * 5]),
        ("cosine", "joint", [[(1 + math.cos(math.pi * k / 5)) / 2] * 5 for k in range(1, 5)] + [[0] * 5]),
        ("linear", "first_to_last", [[0] * k + [1] * (5 - k) for k in range(1, 6)]),
        ("linear", "last_to_first", [[1] * (5 - k) + [0] * k for k in range(1, 6)]),
    ],
)
def test_units_fade_out_and_the_others_are_not_touched(
    shape: Any, order: Any, own: list[list[float]], tmp_path: Any
) -> None:
    """Heads, key-value groups, channels, hidden dimensions and a layer together, in one window of five steps."""
    lm = tiny_lm("llama_tied")
    module = Measured(lm)
    parts = [from_file(plan_for("llama_tied", lm), tmp_path), GateAnnealing(shape=shape, order=order)]
    fit(module, [*parts, StructuredCut(at=5, validate=False)], batches(5), max_steps=5)
    jointly = [1 - k / 5 if shape == "linear" else (1 + math.cos(math.pi * k / 5)) / 2 for k in range(1, 6)]
    for step, seen in enumerate(module.steps):
        alphas = {(unit, i): own[step][turn] for turn, i in enumerate(STAY) for unit in ("heads", "channels")}
        alphas["hidden", 0] = jointly[step]
        for (unit, layer), alpha in alphas.items():
            expected = torch.ones_like(seen[unit, layer])
            expected[removed_columns(unit, layer)] = alpha
            torch.testing.assert_close(seen[unit, layer], expected, rtol=0, atol=1e-4)


def structures_of(name: str) -> list[tuple[str, ...]]:
    """Layers alone, and all that the family can lose together."""
    possible = combinations_of(tiny_lm(name))
    return [("layers",), max(possible, key=len)]


@pytest.mark.parametrize(("name", "structures"), [(name, s) for name in FAMILIES for s in structures_of(name)])
def test_no_jump_at_the_cut(name: str, structures: tuple[str, ...], tmp_path: Any) -> None:
    lm = tiny_lm(name)
    plan = random_plan(anatomy_of(lm), structures, random.Random(1))
    cut = StructuredCut(at=4)
    fit(Plain(lm), [from_file(plan, tmp_path), GateAnnealing(), cut], batches(5), max_steps=5)
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)


def test_every_cut_has_a_window_of_its_own(tmp_path: Any) -> None:
    """One of a single step for layers, and another for channels."""
    lm, smaller = tiny_lm("llama_tied"), tiny_lm("llama_tied", num_layers=4)
    later = PruningPlan.keeping(anatomy_of(smaller), channels=[range(40)] * 4)
    later.save(tmp_path / "later.json")
    cuts = [StructuredCut(at=1), StructuredCut(at=3)]
    selectors = [plan_of(lm, tmp_path), PlanFromFile(str(tmp_path / "later.json"), start=2)]
    fit(Plain(lm), [*selectors, GateAnnealing(), *cuts], batches(3), max_steps=3)
    assert anatomy_of(lm).shape.channels == 40
    for cut in cuts:
        assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("units", "hooked"),
    [
        (("channels",), {"mlp.down_proj"}),
        (("heads",), {"self_attn.o_proj"}),
        (("layers", "channels"), {"", "mlp.down_proj"}),
    ],
)
def test_what_stays_whole_costs_nothing_and_no_hook_is_left_behind(
    units: tuple[str, ...], hooked: set[str], tmp_path: Any
) -> None:
    lm = tiny_lm("llama_tied")

    def hooks(*_: Any) -> dict[str, set[str]]:
        found = defaultdict(set)
        for name, module in lm.named_modules():
            if name.startswith("model.layers.") and (module._forward_hooks or module._forward_pre_hooks):
                layer, _, inner = name.removeprefix("model.layers.").partition(".")
                found[layer].add(inner)
        return found

    spy = Spy(hooks, "on_before_zero_grad")
    parts = [from_file(plan_for("llama_tied", lm, *units), tmp_path), GateAnnealing()]
    fit(Plain(lm), [spy, *parts, StructuredCut(at=2, validate=False)], batches(3), max_steps=3)
    stay = {str(i) for i in (STAY if "layers" in units else range(6))}
    assert spy.seen[0] == {layer: hooked - {""} for layer in stay} | ({"2": {""}} if "" in hooked else {})
    assert spy.seen[2] == {}


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
    """All the way to layers that are left out, and with units of every kind."""

    def run(checkpointed: bool) -> dict[str, Tensor]:
        lm = tiny_lm("llama_tied")
        if checkpointed:
            lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
            lm.enable_input_require_grads()
        parts = [from_file(plan_for("llama_tied", lm), tmp_path), GateAnnealing(), StructuredCut(at=4)]
        fit(Plain(lm), parts, batches(5), max_steps=5)
        return weights(lm)

    assert_close(run(True), run(False), rtol=1e-4, atol=1e-6)
