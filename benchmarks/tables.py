"""Writes what the benchmarks found into the documents: tables between their marks, and pictures.

    python benchmarks/tables.py

A test fails where a document says something else than the results.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import depth
import domains
import recovery
import width
from matplotlib import rc_context
from matplotlib.figure import Figure
from quality import RESULTS, Results, Row, table

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "docs" / "measurements.md", ROOT / "benchmarks" / "README.md")

ALL_WIDTH = tuple(width.rows())
TABLES: Mapping[str, Callable[[], Iterable[str]]] = {
    "depth": lambda: table(depth.ROWS, results("depth")),
    "domains": lambda: domains.table(results("domains")),
    **{
        f"recovery {cut}": lambda cut=cut: recovery.table(recovery.Found(results("recovery")), cut)
        for cut in recovery.CUTS
    },
    **{
        f"width {target}": lambda target=target: table(
            [row for row in ALL_WIDTH if row.name == "dense" or row.name.startswith(f"{target} ")], results("width")
        )
        for target in width.TARGETS
    },
}
PICTURES: Mapping[str, Sequence[Row]] = {"depth": depth.ROWS, "width": ALL_WIDTH}
LARGEST = 200.0  # perplexities above are for the tables
TICKS = (20, 30, 40, 60, 80, 100, 150, 200)
COLORS = {  # Okabe and Ito's, which stay apart for the color-blind
    "not trained": "#000000",
    "finetuned": "#0072B2",
    "emptied, then recovery": "#009E73",
    "emptied, and cut at the very end": "#D55E00",
}


def results(name: str) -> Results:
    """What is there of a benchmark."""
    return Results(RESULTS / f"{name}.jsonl")


def filled(text: str) -> str:
    """A document with the tables of today between its marks `<!-- table: name -->` and `<!-- end -->`."""

    def fill(found: re.Match[str]) -> str:
        return "\n".join([f"<!-- table: {found[1]} -->", *TABLES[found[1]](), "<!-- end -->"])

    return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def kind(row: Row) -> str:
    """What the colors tell apart."""
    if row.cut == 0:
        return "finetuned" if row.trained else "not trained"
    return "emptied, and cut at the very end" if row.cut == 1 else "emptied, then recovery"


def picture(rows: Sequence[Row], found: Results) -> Figure:
    """Held-out perplexities, a dot for each seed; a ring is what it was just before a cut at the very end."""
    runs = {row: found.ends(row) for row in rows}
    shown = [row for row in rows if runs[row] and min(run["ppl"]["held"] for run in runs[row]) <= LARGEST]
    figure = Figure(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="held-out perplexity")
    for name, color in COLORS.items():
        dots = [(run, place) for place, row in enumerate(shown) for run in runs[row] if kind(row) == name]
        for run, place in dots:
            if run.get("before_cut") and shown[place].cut == 1:
                jump = [run["before_cut"]["held"], run["ppl"]["held"]]
                axes.plot(jump, [place, place], "o-", color=color, linewidth=1, markerfacecolor="white")
        axes.plot([run["ppl"]["held"] for run, _ in dots], [place for _, place in dots], "o", color=color, label=name)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(right=LARGEST)
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.grid(linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=len(COLORS))
    return figure


def main() -> None:
    """Bring documents and pictures up to date."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text()))
    with rc_context({"svg.hashsalt": "lightprune"}):
        for name, rows in PICTURES.items():
            picture(rows, results(name)).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
