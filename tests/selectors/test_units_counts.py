"""How many units stay: counts, ratios and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightprune import ConfigError
from lightprune.anatomy import Shape
from lightprune.selectors.counts import Counts, serving_advice

SMOL = Shape(layers=30, hidden=576, heads=9, kv_groups=3, head_dim=64, channels=1536)
ALONE = Shape(layers=12, hidden=768, heads=12, kv_groups=12, head_dim=64, channels=3072)


def counts(multiple_of: int = 64, **keep: Any) -> Counts:
    asked = {"heads": None, "kv_groups": None, "channels": None, "hidden": None} | keep
    return Counts("Some", multiple_of=multiple_of, **asked)


@pytest.mark.parametrize(
    ("source", "keep", "expected"),
    [
        (SMOL, {"channels": 1000}, {"channels": 1000}),
        (SMOL, {"channels": 1536, "heads": 9}, {}),
        (SMOL, {"channels": 0.66}, {"channels": 1024}),  # 1013.8, nearest to 16 * 64
        (SMOL, {"channels": 0.99}, {"channels": 1472}),  # not all of them
        (SMOL, {"channels": 0.001}, {"channels": 64}),  # not none
        (SMOL, {"hidden": 0.75}, {"hidden": 448}),  # 432 lies between 384 and 448
        (SMOL, {"hidden": 0.75, "multiple_of": 144}, {"hidden": 432}),
        (SMOL, {"kv_groups": 2}, {"kv_groups": 2, "heads": 6}),
        (SMOL, {"kv_groups": 0.6}, {"kv_groups": 2, "heads": 6}),
        (SMOL, {"kv_groups": 0.99}, {"kv_groups": 2, "heads": 6}),
        (SMOL, {"kv_groups": 0.01}, {"kv_groups": 1, "heads": 3}),
        (SMOL, {"heads": 6}, {"heads": 6}),
        (SMOL, {"heads": 0.5}, {"heads": 6}),  # 4.5 lies half way between 3 and 6
        (SMOL, {"heads": 0.01}, {"heads": 3}),
        (SMOL, {"heads": 2, "kv_groups": 2}, {"heads": 2, "kv_groups": 2}),
        (SMOL, {"heads": 0.4, "kv_groups": 2}, {"heads": 4, "kv_groups": 2}),
        (SMOL, {"heads": 0.99, "kv_groups": 2}, {"heads": 6, "kv_groups": 2}),  # two groups have no more
        (SMOL, {"heads": 9, "kv_groups": 3, "hidden": 100}, {"hidden": 100}),
        (ALONE, {"heads": 8}, {"heads": 8, "kv_groups": 8}),
        (ALONE, {"heads": 0.5}, {"heads": 6, "kv_groups": 6}),
        (ALONE, {"kv_groups": 8}, {"heads": 8, "kv_groups": 8}),
        (ALONE, {"heads": 8, "kv_groups": 8}, {"heads": 8, "kv_groups": 8}),
    ],
)
def test_what_stays(source: Shape, keep: dict[str, Any], expected: dict[str, int]) -> None:
    assert vars(counts(**keep).of(source)) == vars(source) | expected


@given(there=st.integers(2, 20000), ratio=st.floats(0, 1, exclude_min=True, exclude_max=True), data=st.data())
def test_ratios_go_to_the_nearest_multiple_that_is_neither_none_nor_all(there: int, ratio: float, data: Any) -> None:
    multiple = data.draw(st.integers(1, there - 1))
    source = Shape(layers=1, hidden=there, heads=1, kv_groups=1, head_dim=8, channels=8)
    kept = counts(hidden=ratio, multiple_of=multiple).of(source).hidden
    possible = range(multiple, there, multiple)
    assert kept in possible
    assert abs(kept - ratio * there) <= min(abs(other - ratio * there) for other in possible) + 1e-9 * there


@pytest.mark.parametrize(
    ("source", "keep", "message"),
    [
        (SMOL, {}, "Some selects nothing: set at least one of `heads`, `kv_groups`, `channels` and `hidden`"),
        (SMOL, {"channels": 0}, "Some.channels is 0: the model has 1536, so `channels` must be a count from 1 to 1536"),
        (SMOL, {"channels": 1537}, "Some.channels is 1537: .* from 1 to 1536, or a ratio between 0 and 1"),
        (SMOL, {"hidden": -1}, "Some.hidden is -1"),
        (SMOL, {"kv_groups": 4}, "Some.kv_groups is 4: the model has 3"),
        (SMOL, {"channels": 1.0}, "Some.channels is 1.0: a ratio must lie between 0 and 1; write a count as a whole"),
        (SMOL, {"hidden": 576.0}, "Some.hidden is 576.0: a ratio must lie"),
        (SMOL, {"channels": float("nan")}, "Some.channels is nan: a ratio must lie"),
        (
            SMOL,
            {"hidden": 0.5, "multiple_of": 576},
            "no multiple of 576 .* set `hidden` to a count, or lower `multiple_of`",
        ),
        (SMOL, {"hidden": 0.5, "multiple_of": 0}, "Some.multiple_of is 0: it must be at least 1"),
        (SMOL, {"heads": 7}, "Some.heads is 7: .*3 key-value heads .*nearest: 6 or 9 query heads"),
        (SMOL, {"heads": 7, "kv_groups": 2}, "2 key-value heads that stay serve at most 6 query heads, 3 each"),
        (SMOL, {"heads": 5, "kv_groups": 2}, "nearest: 4 or 6 query heads"),
        (SMOL, {"heads": 1, "kv_groups": 2}, "nearest: 2 query heads"),
        (ALONE, {"heads": 4, "kv_groups": 8}, "Some.heads is 4: .*nearest: 8 query heads"),
        (ALONE, {"heads": 0.5, "kv_groups": 12}, "Some.heads is 0.5: .* keep fewer `kv_groups`"),
    ],
)
def test_refusals_name_the_value_and_the_key(source: Shape, keep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        counts(**keep).of(source)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"channels": 1024}, []),
        ({"channels": 1000}, ["1000 MLP channels are no multiple of 64"]),
        ({"kv_groups": 2}, []),
        ({"kv_groups": 1}, []),
        ({"heads": 6}, []),  # three key-value heads, as there were
    ],
)
def test_advice_is_about_what_changes(keep: dict[str, int], said: list[str]) -> None:
    advice = serving_advice(SMOL, counts(**keep).of(SMOL))
    assert [sentence.split(":")[0] for sentence in advice] == said


def test_odd_key_value_heads_are_advised_against() -> None:
    (advice,) = serving_advice(ALONE, counts(kv_groups=7).of(ALONE))
    assert advice.startswith("7 key-value heads are odd")
