"""Figures of a run."""

from pathlib import Path

from lightprune.masks.figure import mask_figure


def test_mask_figure_draws_sparsity_and_target_of_every_structure(tmp_path: Path) -> None:
    history = [(step, {"hidden": (0.01 * step, 0.02 * step), "layers": (0.0, 0.2)}) for step in range(0, 10, 2)]
    figure = mask_figure(history)
    (axes,) = figure.axes
    lines = {(line.get_label(), tuple(line.get_ydata())) for line in axes.get_lines() if line.get_linestyle() == "-"}
    assert lines == {("hidden", (0.0, 0.02, 0.04, 0.06, 0.08)), ("layers", (0.0,) * 5)}
    dashed = [tuple(line.get_ydata()) for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert dashed == [(0.0, 0.04, 0.08, 0.12, 0.16), (0.2,) * 5]
    assert all(list(line.get_xdata()) == [0, 2, 4, 6, 8] for line in axes.get_lines())
    figure.savefig(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
