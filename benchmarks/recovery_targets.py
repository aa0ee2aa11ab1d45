"""What the recovery benchmark was meant to reach, and what it did: one entry a target."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recovery_rows import BEST, ROWS, STEPS, Row, rows_of

COMMAND = "python benchmarks/recovery.py table"
Value = Callable[[str, str, str], "float | None"]  # of a cut, a row and a text: the excess, in nats a token
Entry = tuple[str, float | None, float]  # a target's name, what was measured, and what was wanted at the most

NOT_OURS = ("cut", "optipfair", "torch-pruning", "ReplaceMe", "SLEB's layers", "ShortGPT")


def trained(cut: str, ends: str, *, ours: bool) -> Iterable[Row]:
    """Rows of 128 steps that train, by whose they are and how their names end."""
    for row in rows_of(cut):
        is_ours = "refitted" in row.name or not row.name.startswith(NOT_OURS)
        if row.steps == STEPS and (row.rates or row.like) and is_ours == ours and ends in row.name:
            yield row


def best(value: Value, cut: str, rows: Iterable[Row], text: str = "mean") -> float | None:
    """The least excess of some rows."""
    return min((found for row in rows if (found := value(cut, row.name, text)) is not None), default=None)


class Measured:
    """What the rows came to, and how they compare; None where a row is not run.

    Args:
        value: gives medians over seeds.
        dense: the dense model's loss on WikiText-2.
    """

    def __init__(self, value: Value, dense: float) -> None:
        self._value = value
        self._dense = dense

    def of(self, cut: str, *names: str, text: str = "mean") -> float | None:
        """The least excess of the rows with these names."""
        return best(self._value, cut, (row for row in ROWS if row.name in names), text)

    def ours(self, cut: str) -> float | None:
        """The least of our trained rows."""
        return best(self._value, cut, trained(cut, "", ours=True))

    def rival(self, cut: str, ends: str) -> float | None:
        """The least of the one-shot cuts, ours and the packages', that are finetuned, or distilled."""
        rows = (row for row in trained(cut, ends, ours=False) if not row.name.startswith("ReplaceMe"))
        return best(self._value, cut, rows)

    def perplexities(self, cut: str, ours: str, theirs: str, text: str) -> float | None:
        """The ratio of two rows' perplexities on a text."""
        left, right = self.of(cut, ours, text=text), self.of(cut, theirs, text=text)
        return None if left is None or right is None else math.exp(left - right)

    def perplexity(self, cut: str, name: str) -> float | None:
        """On WikiText-2."""
        excess = self.of(cut, name, text="wikitext")
        return None if excess is None else math.exp(self._dense + excess)

    def against_rivals(self) -> Iterator[Entry]:
        """Our best rows over those of one-shot cuts."""
        for title, cut, ends, wanted in (
            ("finetuning, depth", "depth", "finetuned", 0.70),
            ("distillation, depth", "depth", "distilled", 0.90),
            ("finetuning, MLP", "mlp", "finetuned", 0.70),
            ("distillation, MLP", "mlp", "distilled", 0.90),
            ("finetuning, all structures", "all structures", "finetuned", 0.75),
        ):
            yield f"ours best / {title}", ratio(self.ours(cut), self.rival(cut, ends)), wanted

    def between_rows(self) -> Iterator[Entry]:
        """Rows over other rows."""
        taught, refitted = ("cut, distilled", "cut, distilled (half)"), ("cut, refitted, distilled", BEST)
        gates = [row.name for row in ROWS if row.name.startswith("gates")]
        for title, cut, text, ours, theirs, wanted in (
            ("distillation / finetuning, the same cut, depth", "depth", "mean", taught, ["cut, finetuned"], 0.80),
            (
                "no training, depth: refitted / finetuned, on own text",
                "depth",
                "own",
                ["cut, refitted"],
                ["cut, finetuned"],
                0.85,
            ),
            ("no training, MLP: refitted / cut", "mlp", "mean", ["cut, refitted"], ["cut"], 0.70),
            ("refit and distillation / distillation alone, MLP", "mlp", "mean", refitted, taught, 0.95),
            ("refit and distillation / distillation alone, depth", "depth", "mean", refitted, taught, 0.90),
            (
                "learned gates untrained / the better of ShortGPT and SLEB",
                "depth",
                "mean",
                gates,
                ["cut", "SLEB's layers"],
                0.90,
            ),
            (
                "48 steps of ours (49k tokens) / 128 of finetuning, depth",
                "depth",
                "mean",
                [f"{BEST}, 48 steps"],
                ["cut, finetuned"],
                1.0,
            ),
        ):
            yield title, ratio(self.of(cut, *ours, text=text), self.of(cut, *theirs, text=text)), wanted

    def in_perplexity(self) -> Iterator[Entry]:
        """Without training."""
        on_wikitext = self.perplexities("depth", "cut, refitted on WikiText-2", "cut", "wikitext")
        yield "no training, depth, calibrated on WikiText-2: perplexity refitted / cut", on_wikitext, 0.40
        on_own = self.perplexities("mlp", "cut, refitted", "cut", "own")
        yield "no training, MLP: perplexity of own text, refitted / cut", on_own, 0.70
        hidden = self.perplexity("hidden", "cut, refitted")
        yield "hidden 576 -> 432, no training: perplexity on WikiText-2", hidden, 200


def targets(value: Value, dense: float) -> list[dict[str, Any]]:
    """One entry a target: what was measured, what was wanted, and by which command; see `Measured`."""
    measured = Measured(value, dense)
    return [
        {
            "name": name,
            "measured": None if number is None else round(number, 3),
            "wanted": f"<= {wanted}",
            "command": COMMAND,
        }
        for entries in (measured.against_rivals(), measured.between_rows(), measured.in_perplexity())
        for name, number, wanted in entries
    ]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """None where one of them is not run."""
    return None if ours is None or theirs is None else ours / theirs
