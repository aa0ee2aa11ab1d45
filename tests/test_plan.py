"""The plan as a value: JSON in and out, refusals, and how plans combine. What it foretells is tested with surgery."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightprune import ConfigError, PruningPlan
from lightprune.anatomy import Shape, anatomy_of
from tests.families import FAMILIES, NUM_LAYERS, combinations_of, random_plan, tiny_lm

SOURCE = Shape(layers=3, hidden=8, heads=4, kv_groups=2, head_dim=2, channels=6)


def some_of(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, count - 1), min_size=1).map(sorted).map(tuple)


def per_layer(count: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...] | None]:
    return st.none() | st.lists(some_of(count), min_size=3, max_size=3).map(tuple)


plain = st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False) | st.lists(st.booleans()))


def plans(provenance: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[PruningPlan]:
    """Plans as values, possible or not."""
    return st.builds(
        PruningPlan,
        st.just("llama"),
        st.just(SOURCE),
        some_of(3),
        per_layer(4),
        per_layer(6),
        st.none() | some_of(8),
        provenance,
    )


@settings(deadline=None)
@given(plans(plain))
def test_json_roundtrip(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again.kept_heads) == hash(plan.kept_heads)  # tuples all the way down
    assert sorted((*plan.kept_layers, *plan.dropped_layers)) == [0, 1, 2]
    for unit, count in (("heads", 4), ("channels", 6), ("hidden", 8), ("kv_groups", 2)):
        for layer in range(3):
            assert sorted((*again.kept(unit, layer), *again.removed(unit, layer))) == list(range(count))


@pytest.mark.parametrize("name", FAMILIES)
def test_file_roundtrip(name: str, tmp_path: Path) -> None:
    lm = tiny_lm(name)
    plan = random_plan(anatomy_of(lm), combinations_of(lm)[-1], random.Random(0))
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan == PruningPlan.load(str(tmp_path / "plan.json"))
    loaded.validate(anatomy_of(lm))
    assert json.loads((tmp_path / "plan.json").read_text())["kept_layers"] == list(plan.kept_layers)


def test_provenance_is_what_was_said() -> None:
    plan = PruningPlan.dropping(anatomy_of(tiny_lm()), [4, 1], selector="by hand", scores={"1": 0.5})
    assert plan.provenance == {"selector": "by hand", "scores": {"1": 0.5}}
    assert plan.dropped_layers == (1, 4)


def test_plans_do_not_change() -> None:
    plan = PruningPlan.dropping(anatomy_of(tiny_lm()), [1])
    with pytest.raises(AttributeError):
        plan.kept_layers = (0,)  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILIES)
def test_config_is_a_new_object_and_valid(name: str) -> None:
    anatomy = anatomy_of(tiny_lm(name))
    config = PruningPlan.dropping(anatomy, [0, 4]).config(anatomy)
    assert config is not anatomy.config
    assert config.num_hidden_layers == 4
    assert anatomy.config.num_hidden_layers == 6
    config.validate()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_for_given_counts_arrives_at_them(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    for structures in combinations_of(lm):
        target = random_plan(anatomy, structures, random.Random(1)).shape
        plan = PruningPlan.arriving_at(anatomy, target)
        plan.validate(anatomy)
        assert plan.shape == target


def test_structures_are_what_something_is_removed_of() -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    everything = PruningPlan.keeping(
        anatomy,
        layers=range(6),
        heads=[range(4)] * NUM_LAYERS,
        channels=[range(48)] * NUM_LAYERS,
        hidden=range(32),
    )
    assert everything.structures == ()
    assert everything.shape == anatomy.shape
    assert PruningPlan.keeping(anatomy, heads=[[0, 2]] * NUM_LAYERS).structures == ("heads",)
    assert PruningPlan.keeping(anatomy, heads=[[2, 3]] * NUM_LAYERS).structures == ("heads", "kv_groups")
    plan = PruningPlan.keeping(anatomy, layers=[1], channels=[[7]] * NUM_LAYERS, hidden=[3, 5, 6, 7])
    assert plan.structures == ("layers", "channels", "hidden")
    assert plan.shape == Shape(layers=1, hidden=4, heads=4, kv_groups=2, head_dim=8, channels=1)


# Reading


def values(**changes: Any) -> dict[str, Any]:
    return PruningPlan("llama", SOURCE, (0, 2)).to_dict() | changes


@pytest.mark.parametrize("missing", list(values()))
def test_every_field_is_needed(missing: str) -> None:
    incomplete = values()
    del incomplete[missing]
    with pytest.raises(ConfigError, match="exactly the fields"):
        PruningPlan.from_dict(incomplete)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"extra": 1}, "exactly the fields"),
        ({"format": 2}, "`format` is 2; this version reads 1"),
        ({"model_type": 3}, "`model_type` must be a string; it is 3"),
        ({"provenance": "me"}, "`provenance` must be an object; it is 'me'"),
        ({"source": {"layers": 3}}, "`source` must state whole numbers above 0"),
        ({"source": dataclasses.asdict(SOURCE) | {"heads": 4.0}}, "`source` must state whole numbers above 0"),
        ({"source": dataclasses.asdict(SOURCE) | {"kv_groups": 0}}, "`source` must state whole numbers above 0"),
        ({"source": dataclasses.asdict(SOURCE) | {"more": 1}}, "`source` must state whole numbers above 0"),
        ({"kept_layers": None}, "`kept_layers` must be a list of whole numbers; it is None"),
        ({"kept_layers": [True]}, "`kept_layers` must be a list of whole numbers"),
        ({"kept_heads": [0, 1]}, r"`kept_heads\[0\]` must be a list of whole numbers; it is 0"),
        ({"kept_channels": 7}, "`kept_channels` must be null or a list of lists; it is 7"),
        ({"kept_channels": [[0], [1.5], [2]]}, r"`kept_channels\[1\]` must be a list of whole numbers"),
        ({"kept_hidden": {"0": 1}}, "`kept_hidden` must be a list of whole numbers"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PruningPlan.from_json(json.dumps(values(**changes)))


def test_what_is_no_plan_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        PruningPlan.from_json("{")
    with pytest.raises(ConfigError, match=r"exactly the fields .* has list"):
        PruningPlan.from_json("[]")
    with pytest.raises(ConfigError, match=r"no pruning plan at .*nowhere\.json.*`path`"):
        PruningPlan.load(tmp_path / "nowhere.json")


# Refusals


def with_one(entry: list[int], usual: list[int]) -> list[list[int]]:
    """Layer 4 keeps something else than the others."""
    return [usual] * 4 + [entry] + [usual]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"layers": []}, r"`kept_layers` are \[\]: .* from 0 to 5"),
    ({"layers": [0, 6]}, r"`kept_layers` are \[0, 6\]: .* from 0 to 5"),
    ({"layers": [-1, 2]}, r"`kept_layers` are \[-1, 2\]"),
    ({"layers": [1, 1]}, r"`kept_layers` are \[1, 1\]: they must be at least one distinct index"),
    ({"heads": with_one([0, 4], [0, 2])}, r"`kept_heads\[4\]` are \[0, 4\]: .* from 0 to 3"),
    ({"heads": with_one([2, 2], [0, 2])}, r"`kept_heads\[4\]` are \[2, 2\]"),
    ({"heads": with_one([], [0, 2])}, r"`kept_heads\[4\]` is empty: no stock class has a layer without its attention"),
    ({"channels": with_one([], [0, 2])}, r"`kept_channels\[4\]` is empty: no stock class has a layer without its MLP"),
    ({"heads": [[0, 2]] * 5}, r"`kept_heads` has 5 entries: .* the model's 6 layers"),
    ({"heads": with_one([0, 1, 2, 3], [0, 2])}, "`kept_heads` have from 2 to 4 entries a layer: .* same count"),
    ({"heads": with_one([0, 1], [0, 2])}, r"`kept_heads` keep from 1 to 2 key-value groups a layer: .* as many groups"),
    (
        {"heads": [[0, 1, 2]] * NUM_LAYERS},
        r"`kept_heads\[0\]` are \[0, 1, 2\]: 3 query heads do not divide evenly among 2 key-value heads "
        r"\(nearest: 2 or 4 query heads\); every key-value head must serve the same number",
    ),
    ({"channels": [[1], [2]]}, "`kept_channels` has 2 entries: .* 6 layers"),
    ({"channels": with_one([48], [3])}, r"`kept_channels\[4\]` are \[48\]: .* from 0 to 47"),
    ({"channels": with_one([1, 2], [3])}, "`kept_channels` have from 1 to 2 entries a layer"),
    ({"hidden": [32]}, r"`kept_hidden` are \[32\]: .* from 0 to 31"),
    ({"hidden": []}, r"`kept_hidden` are \[\]"),
    ({"hidden": range(-1, 31)}, r"`kept_hidden` are \[-1, 0, .* \.\.\. .*30\]: "),
]


@pytest.mark.parametrize(("kept", "sentence"), REFUSALS)
def test_impossible_indices_are_refused(kept: dict[str, Any], sentence: str) -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    with pytest.raises(ConfigError, match=sentence) as caught:
        PruningPlan.keeping(anatomy, **kept)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    PruningPlan.of(anatomy, **kept)  # checks nothing


@pytest.mark.parametrize(
    ("heads", "sentence"),
    [
        # transformers builds, saves and loads a model of 5 heads in 2 groups, and fails when it runs.
        ([0, 1, 2, 3, 4], r"5 query heads do not divide evenly among 2 key-value heads \(nearest: 4 or 6 query"),
        ([0, 1, 2, 5], r"`kept_heads\[0\]` are \[0, 1, 2, 5\]: its groups keep from 1 to 3 query heads"),
        ([0, 4, 5], r"3 query heads do not divide evenly among 2 key-value heads \(nearest: 2 or 4 query heads\)"),
    ],
)
def test_groups_of_different_sizes_are_refused(heads: list[int], sentence: str) -> None:
    anatomy = anatomy_of(tiny_lm("mistral", num_attention_heads=8, hidden_size=64))
    with pytest.raises(ConfigError, match=sentence):
        PruningPlan.keeping(anatomy, heads=[heads] * NUM_LAYERS)


def test_unsorted_indices_of_a_file_are_refused() -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    plan = PruningPlan.keeping(anatomy, hidden=range(16))
    unsorted = dataclasses.replace(plan, kept_hidden=(3, 1, 2))
    with pytest.raises(ConfigError, match=r"`kept_hidden` are \[3, 1, 2\]: .* ascending"):
        unsorted.validate(anatomy)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Shape)])
def test_another_model_is_recognized_by_every_count(field: str) -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    plan = PruningPlan.dropping(anatomy, [1])
    count = getattr(plan.source, field)
    other = dataclasses.replace(plan, source=dataclasses.replace(plan.source, **{field: 2 * count}))
    with pytest.raises(ConfigError, match=f"made for another .* `{field}` is {2 * count}, the model's is {count}"):
        other.validate(anatomy)


def test_another_model_is_recognized_by_its_family() -> None:
    plan = PruningPlan.dropping(anatomy_of(tiny_lm("llama")), [1])
    with pytest.raises(ConfigError, match="its `model_type` is 'llama', the model's is 'mistral'"):
        plan.validate(anatomy_of(tiny_lm("mistral")))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_and_what_they_read_stay(name: str) -> None:
    anatomy = anatomy_of(tiny_lm(name))
    sentence = f"{anatomy.model_type} can be pruned in heads, kv_groups, layers, .* removes channels"
    with pytest.raises(ConfigError, match=sentence):
        PruningPlan.keeping(anatomy, channels=[range(16)] * NUM_LAYERS)
    with pytest.raises(ConfigError, match="the plan removes hidden: leave that out"):
        PruningPlan.keeping(anatomy, hidden=range(16))


def test_layers_that_are_not_there_cannot_be_dropped() -> None:
    with pytest.raises(ConfigError, match=r"Layers \[6\].*0 to 5"):
        PruningPlan.dropping(anatomy_of(tiny_lm()), [6])
    with pytest.raises(ConfigError, match="at least one"):
        PruningPlan.dropping(anatomy_of(tiny_lm()), range(6))


# Combinations


@settings(max_examples=50, deadline=None)
@given(plans(st.just({})), plans(st.just({})))
def test_merged_keeps_what_both_keep(left: PruningPlan, right: PruningPlan) -> None:
    merged = left.merged(right)
    for layer in range(3):
        assert (layer in merged.kept_layers) == (layer in left.kept_layers and layer in right.kept_layers)
        for unit, count in (("heads", 4), ("channels", 6), ("hidden", 8)):
            expected = []
            for index in range(count):
                if index in left.kept(unit, layer) and index in right.kept(unit, layer):
                    expected.append(index)
            assert list(merged.kept(unit, layer)) == expected


def test_merged_plans_for_structures_of_their_own() -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    parts = [
        PruningPlan.dropping(anatomy, [0, 2], by="a"),
        PruningPlan.keeping(anatomy, heads=[[0, 1], [2, 3]] * 3, channels=[range(48)] * 6, by="b"),  # whole groups
        PruningPlan.keeping(anatomy, heads=[[0, 2], [1, 3]] * 3, by="c"),  # heads inside groups
        PruningPlan.keeping(anatomy, channels=[range(layer, 40 + layer) for layer in range(6)], by="d"),
        PruningPlan.keeping(anatomy, hidden=range(0, 32, 2), by="e"),
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    merged.validate(anatomy)
    assert merged.shape == Shape(layers=4, hidden=16, heads=1, kv_groups=1, head_dim=8, channels=40)
    assert merged.kept_heads == ((0,), (3,)) * 3
    assert merged.kept_channels == parts[3].kept_channels
    assert merged.provenance == {"parts": [{"by": letter} for letter in "abcde"]}


def test_plans_for_different_models_do_not_merge() -> None:
    with pytest.raises(AssertionError):
        PruningPlan("llama", SOURCE, (0,)).merged(PruningPlan("mistral", SOURCE, (0,)))


def test_one_plan_after_another_speaks_of_the_first_model() -> None:
    anatomy = anatomy_of(tiny_lm("llama"))
    first = PruningPlan.keeping(
        anatomy, layers=[1, 3, 4], heads=[[2, 3]] * 6, channels=[range(layer, 48, 6) for layer in range(6)], by="a"
    )
    second = PruningPlan(
        "llama",
        Shape(layers=3, hidden=32, heads=2, kv_groups=1, head_dim=8, channels=8),
        kept_layers=(0, 2),
        kept_heads=((1,), (0,), (1,)),
        kept_channels=((0, 7), (1, 2), (3, 4)),
        kept_hidden=(5, 6, 7, 8),
        provenance={"by": "b"},
    )
    both = first.then(second)
    both.validate(anatomy)
    assert both.kept_layers == (1, 4)
    assert (both.kept("heads", 1), both.kept("heads", 4)) == ((3,), (3,))
    assert both.kept("channels", 1) == (1, 43)
    assert both.kept("channels", 4) == (4 + 3 * 6, 4 + 4 * 6)
    assert both.kept_hidden == (5, 6, 7, 8)
    assert both.provenance == {"cuts": [{"by": "a"}, {"by": "b"}]}
