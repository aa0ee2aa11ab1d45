"""The plan as a value: JSON in and out, and what it refuses. What it foretells is tested with the surgery."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightprune import ConfigError, PruningPlan
from lightprune.anatomy import anatomy_of
from tests.families import FAMILIES, tiny_lm


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1).map(sorted).map(tuple))
    ),
    st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False) | st.lists(st.booleans())),
)
def test_json_roundtrip(layers: tuple[int, tuple[int, ...]], provenance: dict[str, object]) -> None:
    plan = PruningPlan("llama", layers[0], 64, layers[1], provenance)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert sorted((*plan.kept_layers, *plan.dropped_layers)) == list(range(layers[0]))


def test_file_roundtrip(tmp_path: Path) -> None:
    plan = PruningPlan.dropping(anatomy_of(tiny_lm()), [4, 1], selector="by hand", scores={"1": 0.5})
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert PruningPlan.load(str(tmp_path / "plan.json")).dropped_layers == (1, 4)
    assert json.loads((tmp_path / "plan.json").read_text())["kept_layers"] == [0, 2, 3, 5]


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


@pytest.mark.parametrize("missing", ["format", "model_type", "num_layers", "hidden_size", "kept_layers", "provenance"])
def test_every_field_is_needed(missing: str) -> None:
    values = PruningPlan("llama", 2, 8, (0,)).to_dict()
    del values[missing]
    with pytest.raises(ConfigError, match="exactly the fields"):
        PruningPlan.from_dict(values)


def test_layers_that_are_not_there_cannot_be_dropped() -> None:
    with pytest.raises(ConfigError, match=r"Layers \[6\].*0 to 5"):
        PruningPlan.dropping(anatomy_of(tiny_lm()), [6])
