"""The masks over a run, drawn without a display: `figure.savefig(path)` writes it."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

# Optimizer step, and for each structure its masks' expected sparsity and the target of that step.
MaskHistory = Sequence[tuple[int, Mapping[str, tuple[float, float]]]]


def mask_figure(history: MaskHistory) -> Figure:
    """The masks' sparsity of every structure over the optimizer steps, against the target (dashed)."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="expected share of closed masks", ylim=(-0.02, 1.02))
    steps = [step for step, _ in history]
    structures = list(dict.fromkeys(name for _, shares in history for name in shares))
    for index, structure in enumerate(structures):
        sparsity, target = zip(*(shares[structure] for _, shares in history), strict=True)
        axes.plot(steps, sparsity, color=f"C{index}", label=structure)
        axes.plot(steps, target, color=f"C{index}", linestyle="--")
    axes.legend()
    return figure
