"""What the recovery benchmark was meant to reach, and what it did: one entry a target."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from recovery_rows import BEST, ROWS, STEPS, Row, rows_of

COMMAND = "python benchmarks/recovery.py table"
Value = Callable[[str, str, str], "float | None"]  # of a cut, a row and a text: the excess, in nats a token

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


def targets(value: Value, dense: float) -> list[dict[str, Any]]:
    """One entry a target: what was measured, what was wanted, and by which command.

    Args:
        value: gives medians over seeds; None where a row is not run.
        dense: the dense model's loss on WikiText-2.
    """

    def of(cut: str, *names: str, text: str = "mean") -> float | None:
        return best(value, cut, (row for row in ROWS if row.name in names), text)

    def rival(cut: str, ends: str) -> float | None:
        rows = (row for row in trained(cut, ends, ours=False) if not row.name.startswith("ReplaceMe"))
        return best(value, cut, rows)

    def ours(cut: str) -> float | None:
        return best(value, cut, trained(cut, "", ours=True))

    wikitext = "cut, refitted on WikiText-2"
    entries: list[tuple[str, float | None, float]] = [
        (
            "distillation / finetuning, the same cut, depth",
            ratio(of("depth", "cut, distilled", "cut, distilled (half)"), of("depth", "cut, finetuned")),
            0.80,
        ),
        ("ours best / finetuning, depth", ratio(ours("depth"), rival("depth", "finetuned")), 0.70),
        ("ours best / distillation, depth", ratio(ours("depth"), rival("depth", "distilled")), 0.90),
        ("ours best / finetuning, MLP", ratio(ours("mlp"), rival("mlp", "finetuned")), 0.70),
        ("ours best / distillation, MLP", ratio(ours("mlp"), rival("mlp", "distilled")), 0.90),
        (
            "ours best / finetuning, all structures",
            ratio(ours("all structures"), rival("all structures", "finetuned")),
            0.75,
        ),
        (
            "no training, depth: refitted / finetuned, on own text",
            ratio(of("depth", "cut, refitted", text="own"), of("depth", "cut, finetuned", text="own")),
            0.85,
        ),
        (
            "no training, depth, calibrated on WikiText-2: perplexity refitted / cut",
            perplexities(value, "depth", wikitext, "cut", "wikitext"),
            0.40,
        ),
        ("no training, MLP: refitted / cut", ratio(of("mlp", "cut, refitted"), of("mlp", "cut")), 0.70),
        (
            "no training, MLP: perplexity of own text, refitted / cut",
            perplexities(value, "mlp", "cut, refitted", "cut", "own"),
            0.70,
        ),
        (
            "hidden 576 -> 432, no training: perplexity on WikiText-2",
            None if (hidden := of("hidden", "cut, refitted", text="wikitext")) is None else math.exp(dense + hidden),
            200,
        ),
        (
            "refit and distillation / distillation alone, MLP",
            ratio(of("mlp", "cut, refitted, distilled", BEST), of("mlp", "cut, distilled", "cut, distilled (half)")),
            0.95,
        ),
        (
            "refit and distillation / distillation alone, depth",
            ratio(
                of("depth", "cut, refitted, distilled", BEST), of("depth", "cut, distilled", "cut, distilled (half)")
            ),
            0.90,
        ),
        (
            "learned gates untrained / the better of ShortGPT and SLEB",
            ratio(
                best(value, "depth", (r for r in ROWS if r.name.startswith("gates"))),
                of("depth", "cut", "SLEB's layers"),
            ),
            0.90,
        ),
        (
            "48 steps of ours (49k tokens) / 128 of finetuning, depth",
            ratio(of("depth", f"{BEST}, 48 steps"), of("depth", "cut, finetuned")),
            1.0,
        ),
    ]
    return [
        {
            "name": name,
            "measured": None if measured is None else round(measured, 3),
            "wanted": f"<= {wanted}",
            "command": COMMAND,
        }
        for name, measured, wanted in entries
    ]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """None where one of them is not run."""
    return None if ours is None or theirs is None else ours / theirs


def perplexities(value: Value, cut: str, ours: str, theirs: str, text: str) -> float | None:
    """The ratio of two rows' perplexities on a text."""
    left, right = value(cut, ours, text), value(cut, theirs, text)
    return None if left is None or right is None else math.exp(left - right)
