"""Axes as what they are: rows of units, one after the other."""

from hypothesis import given
from hypothesis import strategies as st

from lightprune.anatomy import Shape
from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS, Run, length, rows_of

SHAPE = Shape(layers=2, hidden=20, heads=6, kv_groups=3, head_dim=4, channels=7)


def test_lengths() -> None:
    assert [length(axis, SHAPE) for axis in (HIDDEN, CHANNELS, HEADS, KV_GROUPS)] == [20, 7, 24, 12]
    assert length(HEADS + KV_GROUPS + KV_GROUPS, SHAPE) == 6 * 4 + 2 * 3 * 4
    assert length((Run("heads", vectors=3),), SHAPE) == 6 * 3 * 4
    assert SHAPE.heads_per_group == 2
    assert [SHAPE.count(name) for name in ("layers", "heads", "kv_groups", "channels", "hidden")] == [2, 6, 3, 7, 20]


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 9), st.integers(0, 40))
def test_rows_are_counted_one_by_one(units: list[int], rows: int, offset: int) -> None:
    expected = []
    for unit in units:
        for row in range(rows):
            expected.append(offset + unit * rows + row)
    assert rows_of(units, rows, offset).tolist() == expected
