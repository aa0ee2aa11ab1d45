"""The domains over a run, drawn without a display: `figure.savefig(path)` writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colors, which stay apart for the color-blind; after the last one, other markers begin.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = (".", "o", "s", "^", "v", "D")


def domain_figure(domains: Sequence[str], history: Sequence[Mapping[str, Any]]) -> Figure:
    """The weight, the loss and the excess loss of every domain over the optimizer steps.

    Args:
        domains: their names, D.
        history: an update each: `step`, and `weight`, `ratio`, `loss`, `reference` and `excess`, [D] each; a NaN leaves
            a gap.
    """
    figure = Figure(figsize=(9, 9), layout="constrained", dpi=150)
    weight, loss, excess = figure.subplots(3, sharex=True)
    steps = [row["step"] for row in history]
    for index, domain in enumerate(domains):
        line: dict[str, object] = {
            "color": _COLORS[index % len(_COLORS)],
            "marker": _MARKERS[index // len(_COLORS) % len(_MARKERS)],
        }
        for axes, solid, dashed in ((weight, "weight", "ratio"), (loss, "loss", "reference"), (excess, "excess", None)):
            axes.plot(steps, [row[solid][index] for row in history], label=domain, **line)
            if dashed is not None:
                axes.plot(steps, [row[dashed][index] for row in history], linestyle="--", linewidth=1, **line)
    excess.axhline(0, color="grey", linewidth=0.8)
    weight.set(title="Mixture weight (dashed: reference ratio)", ylabel="share of the samples", ylim=(0, None))
    loss.set(title="Loss (dashed: reference loss)", ylabel="nats per token")
    excess.set(title="Excess loss: loss minus reference", ylabel="nats per token", xlabel="optimizer step")
    figure.legend(*weight.get_legend_handles_labels(), loc="outside right upper", title="domain")
    return figure
