"""Selectors of width in whole fits: what is left, together with other selectors, after a resume, and in the plan."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightprune import (
    ActivationUnitSelector,
    BlockInfluenceSelector,
    ConfigError,
    LayerGateSelector,
    MagnitudeUnitSelector,
    PruningPlan,
    RandomUnitSelector,
    StructuredCut,
    TaylorUnitSelector,
)
from lightprune.anatomy import Shape, Unit, anatomy_of
from lightprune.importance.groups import coupled
from lightprune.selectors.width.units import UnitSelector
from tests.families import NUM_LAYERS, tiny_lm
from tests.training import Batches, Plain, Spy, assert_equal, batches, fit, trainer_for, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MLP channels are no multiple of 64"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

SCORED: dict[str, tuple[type[UnitSelector], dict[str, Any]]] = {
    "magnitude": (MagnitudeUnitSelector, {}),
    "mean": (ActivationUnitSelector, {"metric": "mean", "stop": 2}),
    "l2": (ActivationUnitSelector, {"metric": "l2", "stop": 2}),
    "fluctuation": (ActivationUnitSelector, {"metric": "fluctuation", "stop": 2}),
    "taylor": (TaylorUnitSelector, {"stop": 2}),
}
EVERY = {"random": (RandomUnitSelector, {}), **SCORED}
TARGETS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"channels": 0.5, "multiple_of": 16}, {"channels": 32}),  # 24 lies half way between 16 and 32
    ({"kv_groups": 1}, {"kv_groups": 1, "heads": 2}),
    ({"heads": 2}, {"heads": 2}),
    (
        {"heads": 1, "kv_groups": 1, "channels": 13, "hidden": 20},
        {"heads": 1, "kv_groups": 1, "channels": 13, "hidden": 20},
    ),
]


def make(name: str, **settings: Any) -> UnitSelector:
    kind, own = EVERY[name]
    return kind(**(own | settings))


@pytest.mark.parametrize(("keep", "counts"), TARGETS)
@pytest.mark.parametrize("name", EVERY)
def test_the_cut_model_has_exactly_the_target_shape(name: str, keep: dict[str, Any], counts: dict[str, int]) -> None:
    module, selector, cut = Plain(tiny_lm("llama_tied")), make(name, **keep), StructuredCut(at=3)
    source = anatomy_of(module.lm).shape
    expected = Shape(**(vars(source) | counts))
    fit(module, [selector, cut], batches(4), max_steps=4)
    assert cut.done
    assert anatomy_of(module.lm).shape == expected
    q_rows, kv_rows = expected.heads * 8, expected.kv_groups * 8
    for layer in module.lm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.weight.shape == (q_rows, expected.hidden)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (kv_rows, expected.hidden)
        assert attention.o_proj.weight.shape == (expected.hidden, q_rows)
        assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (expected.channels, expected.hidden)
        assert mlp.down_proj.weight.shape == (expected.hidden, expected.channels)
    plan = selector.plan
    assert plan is not None
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.provenance["selector"] == type(selector).__name__


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", SCORED)
def test_units_that_are_empty_are_those_that_go(name: str, family: str) -> None:
    lm = tiny_lm(family)
    anatomy = anatomy_of(lm)
    shape, grouped = anatomy.shape, anatomy.shape.heads_per_group > 1
    generator = torch.Generator().manual_seed(1)
    dead: dict[Unit, list[list[int]]] = {}
    units: list[tuple[Unit, int]] = [("kv_groups", 1), ("channels", 11), ("hidden", 16 if not grouped else 7)]
    units[0] = ("kv_groups", 1 if grouped else 2)
    for unit, count in units:
        draws = 1 if unit == "hidden" else shape.layers
        dead[unit] = [
            sorted(torch.randperm(shape.count(unit), generator=generator)[:count].tolist()) for _ in range(draws)
        ]
        for index, chosen in enumerate(dead[unit]):
            for group in coupled(anatomy, unit, None if unit == "hidden" else index):
                group.units(group.weight.parameter.data)[chosen] = 0
    selector = make(name, **{unit: shape.count(unit) - count for unit, count in units})
    fit(Plain(lm), [selector], batches(2), max_steps=2)
    assert selector.plan is not None
    for layer in range(shape.layers):
        assert selector.plan.removed("kv_groups", layer) == dead["kv_groups"][layer]
        assert selector.plan.removed("channels", layer) == dead["channels"][layer]
    assert selector.plan.removed("hidden", 0) == dead["hidden"][0]


def test_keys_and_values_count_in_the_magnitude_of_their_group() -> None:
    lm = tiny_lm("llama_tied")
    with torch.no_grad():
        for index, layer in enumerate(lm.model.layers):
            own = slice(8 * (index % 2), 8 * (index % 2) + 8)
            layer.self_attn.k_proj.weight[own] *= 10
            layer.self_attn.v_proj.weight[own] *= 10
    selector = MagnitudeUnitSelector(kv_groups=1)
    fit(Plain(lm), [selector], batches(1), max_steps=1)
    assert selector.plan is not None
    assert [list(selector.plan.kept("kv_groups", layer)) for layer in range(NUM_LAYERS)] == [[0], [1]] * 3


def test_selectors_of_different_structures_make_one_plan_together() -> None:
    """Windows of different lengths: the weights stand still until the last of them closes."""
    module = Plain(tiny_lm("llama_tied"))
    before, seen = weights(module), Spy(lambda trainer, m: weights(m), "on_train_batch_start")
    parts = [
        seen,
        RandomUnitSelector(hidden=24),
        TaylorUnitSelector(channels=20, stop=3),
        BlockInfluenceSelector(drop=2, stop=2),
        ActivationUnitSelector(heads=2, stop=1),
        cut := StructuredCut(at=4),
    ]
    fit(module, parts, batches(6), max_steps=6)
    for step in range(4):
        assert_equal(seen.seen[step], before)
    assert any(not torch.equal(seen.seen[4][name], before[name]) for name in before if name in seen.seen[4])
    expected = Shape(layers=4, hidden=24, heads=2, kv_groups=2, head_dim=8, channels=20)
    assert anatomy_of(module.lm).shape == expected
    assert cut.plan is not None
    assert cut.plan.shape == expected
    made_by = {part["selector"] for part in cut.plan.provenance["parts"]}
    assert made_by == {type(part).__name__ for part in parts[1:-1]}


@pytest.mark.parametrize(
    "rivals",
    [
        lambda: (RandomUnitSelector(channels=8), ActivationUnitSelector(channels=8, stop=1)),
        lambda: (RandomUnitSelector(heads=2), RandomUnitSelector(kv_groups=1, start=1)),
    ],
)
def test_no_structure_is_selected_twice(rivals: Any) -> None:
    with pytest.raises(ConfigError, match="both select"):
        fit(Plain(), [*rivals(), StructuredCut(at=2)], batches(1), max_steps=2)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("llama_tied", {"heads": 3}, "nearest: 2 or 4 query heads"),
        ("gpt2", {"hidden": 16}, "nearest: 4 heads with 32"),
        ("mixtral", {"channels": 16}, "mixtral can be pruned in heads, kv_groups, layers, .* removes channels"),
    ],
)
def test_what_the_class_cannot_hold_is_refused_before_the_first_step(
    name: str, keep: dict[str, Any], message: str
) -> None:
    spy = Spy(lambda *_: None, "on_train_batch_start")
    with pytest.raises(ConfigError, match=message):
        fit(Plain(tiny_lm(name)), [spy, RandomUnitSelector(**keep), StructuredCut(at=1)], batches(1), max_steps=1)
    assert spy.seen == []


def test_counts_that_servers_dislike_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="RandomUnitSelector: 20 MLP channels are no multiple of 64"):
        fit(Plain(), [RandomUnitSelector(channels=20)], batches(1), max_steps=1)


@pytest.mark.parametrize("name", ["l2", "fluctuation", "taylor"])
def test_a_resume_in_the_middle_of_the_window_makes_the_same_plan(name: str, tmp_path: Path) -> None:
    keep = {"kv_groups": 1, "channels": 20, "hidden": 20, "stop": 4}
    whole, first, second = (make(name, **keep) for _ in range(3))
    data, path = batches(4), tmp_path / "middle.ckpt"
    fit(Plain(), [whole], data, max_steps=4)
    fit(Plain(), [first], data, max_steps=3).save_checkpoint(path)
    assert first.plan is None
    # A loader that cannot resume begins again: the one batch that the epoch still has is its first.
    trainer_for([second], 4).fit(Plain(), Batches([data[3]] * 4), ckpt_path=path, weights_only=True)
    assert whole.plan is not None
    assert second.plan is not None
    assert second.plan == whole.plan
    assert second.plan.provenance["passes"] == 4


@pytest.mark.parametrize("name", ["l2", "fluctuation", "taylor"])
def test_sums_of_ranks_add_up(name: str) -> None:
    def sums(data: Batches) -> dict[Unit, torch.Tensor]:
        selector = make(name, kv_groups=1, channels=20, hidden=20, stop=5)
        fit(Plain(), [selector], data, max_steps=len(data))
        state: dict[Unit, torch.Tensor] = selector.scores_state()["sums"]
        return state

    data = batches(4)
    whole, left, right = sums(data), sums(Batches(data[:2])), sums(Batches(data[2:]))
    for unit, values in whole.items():
        torch.testing.assert_close(left[unit] + right[unit], values, rtol=1e-6, atol=1e-9)


def test_once_decided_nothing_is_kept_but_the_plan(tmp_path: Path) -> None:
    selector = make("taylor", channels=20)
    trainer = fit(Plain(), [selector], batches(3), max_steps=3)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    state = torch.load(tmp_path / "some.ckpt", weights_only=True)["callbacks"][selector.state_key]
    assert state["sums"] == {}
    assert PruningPlan.from_dict(state["plan"]) == selector.plan


def test_scores_are_in_the_plan_and_their_spread_in_the_log(tmp_path: Path) -> None:
    selector = make("l2", channels=20, hidden=20)
    logger = CSVLogger(tmp_path)
    trainer_for([selector], 3, logger=logger, log_every_n_steps=1).fit(Plain(), batches(3))
    assert selector.plan is not None
    provenance = selector.plan.provenance
    assert (provenance["metric"], provenance["weighted"], provenance["passes"]) == ("l2", False, 2)
    scores = json.loads(json.dumps(provenance))["scores"]
    assert [len(layer) for layer in scores["channels"]] == [48] * NUM_LAYERS
    for layer, values in enumerate(scores["channels"]):
        cutoff = sorted(values, reverse=True)[19]
        assert all(values[i] >= cutoff for i in selector.plan.kept("channels", layer))
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    for prefix, values in (("select/channels/layer_03", scores["channels"][3]), ("select/hidden", scores["hidden"])):
        (row,) = [row for row in rows if row[f"{prefix}/min"]]
        logged = [float(row[f"{prefix}/{name}"]) for name in ("min", "mean", "max")]
        assert logged == pytest.approx([min(values), sum(values) / len(values), max(values)], rel=1e-3)


def test_random_units_depend_on_their_seed_alone() -> None:
    def draw(seed: int, torch_seed: int) -> PruningPlan | None:
        torch.manual_seed(torch_seed)
        selector = RandomUnitSelector(kv_groups=1, channels=20, hidden=20, seed=seed)
        fit(Plain(), [selector], batches(1), max_steps=1)
        return selector.plan

    draws = [draw(seed, 0) for seed in range(3)]
    assert draws == [draw(seed, 1) for seed in range(3)]
    assert len({plan.kept_hidden for plan in draws if plan}) == 3
    (plan,) = draws[:1]
    assert plan is not None
    assert plan.kept_channels is not None
    assert len(set(plan.kept_channels)) == NUM_LAYERS


@pytest.mark.parametrize(("written", "kept"), [("24", 24), ("0.5", 32), ("1", 1)])
def test_counts_and_ratios_come_from_a_command_line_as_they_are_written(written: str, kept: int) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "selector")
    values = parser.parse_args(
        ["--selector=lightprune.MagnitudeUnitSelector", f"--selector.channels={written}", "--selector.multiple_of=16"]
    )
    selector = parser.instantiate(values).selector
    fit(Plain(), [selector], batches(1), max_steps=1)
    assert selector.plan.shape.channels == kept


def test_a_second_cut_scores_what_the_first_has_left() -> None:
    module = Plain(tiny_lm("llama_tied"))
    first, second = (ActivationUnitSelector(channels=c, start=s, stop=s + 1) for c, s in ((32, 0), (16, 2)))
    fit(module, [first, StructuredCut(at=2), second, StructuredCut(at=4)], batches(5), max_steps=5)
    assert second.plan is not None
    assert second.plan.source.channels == 32
    assert isinstance(module.lm.model.layers[0].mlp.down_proj, nn.Linear)
    assert anatomy_of(module.lm).shape.channels == 16


@pytest.mark.parametrize("start", [0, 1, 2])
def test_scores_of_a_moving_model_are_warned_of(start: int) -> None:
    """Gates of another selector change what is scored, while they learn."""
    gates = LayerGateSelector(drop=1, steps_per_round=2)
    parts = [gates, ActivationUnitSelector(channels=32, start=start, stop=4), StructuredCut(at=4, validate=False)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Plain(), parts, batches(4), 4)
    said = [str(warning.message) for warning in caught if "scores of a moving model" in str(warning.message)]
    assert len(said) == (start < 2)


def test_counts_of_all_that_there_is_are_warned_of() -> None:
    parts = [MagnitudeUnitSelector(heads=4, kv_groups=2), StructuredCut(at=1, validate=False)]
    with pytest.warns(UserWarning, match="MagnitudeUnitSelector keeps all that the model has"):
        fit(Plain(), parts, batches(1), 1)
