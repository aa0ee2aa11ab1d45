import math
from typing import Any

import numpy as np
import pytest

from lightprune.reweighting.figure import domain_figure


def history(domains: int) -> list[dict[str, Any]]:
    rows = np.random.default_rng(0).random((4, 5, domains)).tolist()
    names = ("weight", "ratio", "loss", "reference", "excess")
    return [{"step": 10 * n, **dict(zip(names, row, strict=True))} for n, row in enumerate(rows)]


@pytest.mark.parametrize("domains", [2, 9])
def test_every_number_is_drawn(domains: int) -> None:
    rows = history(domains)
    rows[0]["reference"][0] = math.nan
    names = [f"domain {index}" for index in range(domains)]
    figure = domain_figure(names, rows)
    drawn = [
        (tuple(line.get_xdata()), tuple(line.get_ydata())) for axes in figure.axes for line in axes.get_lines()[:99]
    ]
    steps = tuple(row["step"] for row in rows)
    for name in ("weight", "ratio", "loss", "reference", "excess"):
        for index in range(domains):
            expected = np.array([row[name][index] for row in rows])
            assert any(x == steps and np.array_equal(y, expected, equal_nan=True) for x, y in drawn)
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[2].get_lines()[:domains]}
    assert len(looks) == domains
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert all(axes.get_title() and axes.get_ylabel() for axes in figure.axes)
