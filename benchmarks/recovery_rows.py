"""The cuts and rows of `recovery.py`: what goes, what acts beside the cut, and when it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning.pytorch.callbacks import Callback
from rivals import PLANS, ReplaceMe

import lightprune as lp

BLOCK, BATCH = 256, 4
SELECT = 8
"""Steps that choose what goes."""
TRANSFER = 40
"""The step of the cut in rows that train before it, under a penalty or while something fades out."""
STEPS = 128
MASKED = 64
"""The step of the cut in rows whose choice is learned."""

CUTS: dict[str, Callable[[], list[Callback]]] = {
    "depth": lambda: [lp.BlockInfluenceSelector(drop=8, stop=SELECT)],
    "mlp": lambda: [lp.ActivationUnitSelector(channels=1024, weighted=True, stop=SELECT)],
    "hidden": lambda: [lp.ActivationUnitSelector(hidden=432, stop=SELECT)],
    "all structures": lambda: [
        lp.BlockInfluenceSelector(drop=4, stop=SELECT),
        lp.ActivationUnitSelector(kv_groups=2, channels=1280, hidden=512, weighted=True, stop=SELECT),
    ],
    "depth and width": lambda: [
        lp.BlockInfluenceSelector(drop=4, stop=SELECT),
        lp.ActivationUnitSelector(channels=1152, weighted=True, stop=SELECT),
    ],
}
MASKS: dict[str, dict[str, int]] = {
    "depth": {"layers": 22},
    "mlp": {"channels": 1024},
    "all structures": {"layers": 26, "heads": 6, "kv_groups": 2, "channels": 1280, "hidden": 512},
}

Parts = Callable[[str, int], list[Callback]]  # of a cut, in a run of so many steps
FINE, REFITTED = (1e-4, 2e-4, 4e-4), (1e-4, 2e-4)
TAUGHT = (2e-4, 4e-4)


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is called.
        parts: the selectors, the cut and what acts beside them.
        rates: the learning rates to choose from; none where nothing trains.
        steps: optimizer steps, those that choose what goes included.
        cuts: the cuts that have this row.
        like: the row whose best rate this takes: they differ only in what is done before training.
        text: what is chosen, refitted and trained on.
    """

    name: str
    parts: Parts
    rates: Sequence[float] = ()
    steps: int = STEPS
    cuts: Sequence[str] = tuple(CUTS)
    like: str | None = None
    text: str = "own"


def cut_at(step: int) -> lp.StructuredCut:
    """The cut, without validation around it."""
    return lp.StructuredCut(at=step, validate=False)


def refit(cut: str, batches: int) -> lp.LeastSquaresCompensation:
    """On tokens that training sees later; where hidden dimensions alone go, in the basis of principal components."""
    return lp.LeastSquaresCompensation(batches=batches, rotate=cut == "hidden")


def one_shot(
    refitted: bool = False,
    teacher: float = 0.0,
    choose: Callable[[str], list[Callback]] = lambda cut: CUTS[cut](),
    extra: Callable[[int], list[Callback]] = lambda steps: [],
) -> Parts:
    """Choose, refit if wanted, cut, and train with the teacher's share `teacher` of the loss."""

    def parts(cut: str, steps: int) -> list[Callback]:
        made = [*choose(cut), cut_at(SELECT), *extra(steps)]
        if refitted:
            made.append(refit(cut, max(steps, STEPS) - SELECT))
        if teacher:
            made.append(lp.Distillation(alpha=teacher, start=SELECT))
        return made

    return parts


def emptied(regularizer: Callable[[], Callback], refitted: bool = False, teacher: float = 0.5) -> Parts:
    """Choose, empty what goes while the teacher teaches, cut, and recover with the teacher."""

    def parts(cut: str, steps: int) -> list[Callback]:
        made = [*CUTS[cut](), regularizer(), cut_at(TRANSFER), lp.Distillation(alpha=teacher, start=SELECT)]
        return [*made, refit(cut, steps - TRANSFER)] if refitted else made

    return parts


def learned(cut: str, steps: int) -> list[Callback]:
    """DRPruning's masks, chosen while the weights train; the teacher from the first step on."""
    masks = lp.HardConcreteSelector(stop=MASKED, lr=0.5, **MASKS[cut])
    return [masks, cut_at(MASKED), lp.Distillation(alpha=0.5)]


def gates(cut: str, steps: int, teacher: bool = False) -> list[Callback]:
    """TRSP's and ELDeR's gates, untrained: five steps for each layer that goes."""
    selector = lp.LayerGateSelector(drop=8, stop=steps, lr=0.04, protect_last=3)
    return [selector, cut_at(steps), *([lp.Distillation(alpha=1.0)] if teacher else [])]


def scaled(cut: str, steps: int) -> list[Callback]:
    """ShortGPT's layers go, and how much the others count for is learned from the teacher, with frozen weights."""
    return [*CUTS[cut](), lp.ScaleCalibration(), cut_at(steps), lp.Distillation(alpha=1.0, start=SELECT)]


def projected(cut: str, steps: int) -> list[Callback]:
    """Gates of channels that learn from the teacher, begun by the scores of activations."""
    gates = lp.ProjectedGateSelector(channels=1024, score_steps=SELECT, stop=steps)
    return [gates, cut_at(steps), lp.Distillation(alpha=1.0)]


def elder(cut: str, steps: int) -> list[Callback]:
    """ELDeR: gates by the teacher's divergence, the difference penalty, the cut."""
    gates = lp.LayerGateSelector(drop=8, stop=TRANSFER, lr=0.04, protect_last=3)
    penalty = lp.DifferencePenalty(strength=0.1, relative=True)
    return [gates, penalty, cut_at(TRANSFER + 32), lp.Distillation(alpha=0.5)]


def in_two(cut: str, steps: int) -> list[Callback]:
    """Half of what goes, 32 steps of recovery, and the other half; refitted at both cuts."""
    second = SELECT + 32
    halves: dict[str, Callable[[int, int], Callback]] = {
        "depth": lambda half, start: lp.BlockInfluenceSelector(drop=4, start=start, stop=start + SELECT),
        "mlp": lambda half, start: lp.ActivationUnitSelector(
            channels=(1280, 1024)[half], weighted=True, start=start, stop=start + SELECT
        ),
    }
    return [
        halves[cut](0, 0),
        cut_at(SELECT),
        halves[cut](1, second),
        cut_at(second + SELECT),
        refit(cut, steps - second - SELECT),
        lp.Distillation(alpha=0.5, start=SELECT),
    ]


def from_plan(name: str) -> Callable[[str], list[Callback]]:
    """A package's choice, after as many batches as ours looks at: it has looked at the same."""
    return lambda cut: [lp.PlanFromFile(str(PLANS / f"{name}-{cut}.json"), start=SELECT)]


def sleb(cut: str) -> list[Callback]:
    """SLEB's choice of layers, on the same batches."""
    return [lp.GreedyPerplexitySelector(drop=8, stop=SELECT)]


def by_ranges(cut: str) -> list[Callback]:
    """The channels by optipfair's measure of weights, and the size of activations."""
    return [lp.ActivationUnitSelector(channels=1024, weighted="ranges", stop=SELECT)]


def rivals() -> tuple[Row, ...]:
    """What packages cut, with the best recovery that there is; and ReplaceMe's one map."""
    chosen = [("optipfair", "mlp"), ("torch-pruning", "mlp")]
    of_packages = [
        row
        for name, cut in chosen
        for row in (
            Row(f"{name}'s cut", one_shot(choose=from_plan(name)), steps=SELECT, cuts=(cut,)),
            Row(f"{name}'s cut, finetuned", one_shot(choose=from_plan(name)), FINE[1:], cuts=(cut,)),
            Row(f"{name}'s cut, distilled", one_shot(teacher=1.0, choose=from_plan(name)), TAUGHT, cuts=(cut,)),
        )
    ]

    def replaceme(steps: int) -> list[Callback]:
        return [ReplaceMe(batches=STEPS - SELECT)]

    return (
        *of_packages,
        Row("ReplaceMe", one_shot(extra=replaceme), steps=SELECT, cuts=("depth",)),
        Row("ReplaceMe, finetuned", one_shot(extra=replaceme), REFITTED, cuts=("depth",)),
        Row("ReplaceMe, distilled", one_shot(teacher=1.0, extra=replaceme), TAUGHT, cuts=("depth",)),
    )


DEPTH, MLP = ("depth",), ("mlp",)
BEST = "cut, refitted, distilled (half)"
LONG = 4 * (STEPS - SELECT) + SELECT

ROWS = (
    Row("cut", one_shot(), steps=SELECT),
    Row("cut, refitted", one_shot(refitted=True), steps=SELECT),
    Row("cut, refitted on WikiText-2", one_shot(refitted=True), steps=SELECT, text="wikitext", cuts=("depth", "mlp")),
    Row("cut, finetuned", one_shot(), FINE),
    Row("cut, distilled", one_shot(teacher=1.0), TAUGHT),
    Row("cut, distilled (half)", one_shot(teacher=0.5), TAUGHT),
    Row("cut, refitted, finetuned", one_shot(True), REFITTED, cuts=(*DEPTH, *MLP)),
    Row("cut, refitted, distilled", one_shot(True, 1.0), REFITTED, cuts=(*DEPTH, *MLP)),
    Row(BEST, one_shot(True, 0.5), REFITTED),
    Row(f"{BEST}, 48 steps", one_shot(True, 0.5), REFITTED[1:], steps=48, cuts=(*DEPTH, *MLP)),
    Row("gates", gates, steps=TRANSFER, cuts=DEPTH),
    Row("gates, by the teacher's divergence", partial(gates, teacher=True), steps=TRANSFER, cuts=DEPTH),
    Row("gates of ShortGPT's choice, values learned", scaled, steps=TRANSFER, cuts=DEPTH),
    Row("projected gates", projected, steps=TRANSFER, cuts=MLP),
    Row("channels by ranges", one_shot(choose=by_ranges), steps=SELECT, cuts=MLP),
    Row("channels by ranges, refitted", one_shot(True, choose=by_ranges), steps=SELECT, cuts=MLP),
    Row("channels by ranges, refitted, distilled (half)", one_shot(True, 0.5, by_ranges), cuts=MLP, like=BEST),
    Row("SLEB's layers", one_shot(choose=sleb), steps=SELECT, cuts=DEPTH),
    Row("SLEB's layers, refitted", one_shot(True, choose=sleb), steps=SELECT, cuts=DEPTH),
    Row("SLEB's layers, refitted, distilled (half)", one_shot(True, 0.5, sleb), cuts=DEPTH, like=BEST),
    Row("TRSP (penalty), distilled (half)", emptied(lambda: lp.DifferencePenalty(strength=0.1)), TAUGHT, cuts=DEPTH),
    Row(
        "TRSP (penalty), refitted, distilled (half)",
        emptied(lambda: lp.DifferencePenalty(strength=0.1), refitted=True),
        REFITTED,
        cuts=DEPTH,
    ),
    Row("ELDeR (gates, penalty), distilled (half)", elder, TAUGHT, cuts=DEPTH),
    Row("TRSP (annealed), distilled (half)", emptied(lambda: lp.GateAnnealing()), TAUGHT, cuts=DEPTH),
    Row("DReSS (penalty), distilled (half)", emptied(lambda: lp.GroupNormPenalty()), TAUGHT, cuts=MLP),
    Row(
        "DReSS (penalty), refitted, distilled (half)", emptied(lambda: lp.GroupNormPenalty(), True), REFITTED, cuts=MLP
    ),
    Row("DReSS (proximal), distilled (half)", emptied(lambda: lp.ProximalGroupLasso()), TAUGHT, cuts=MLP),
    Row("DReSS (annealed), distilled (half)", emptied(lambda: lp.GateAnnealing()), TAUGHT, cuts=MLP),
    Row("DRPruning's masks, distilled (half)", learned, TAUGHT, cuts=tuple(MASKS)),
    Row("two cuts, refitted, distilled (half)", in_two, REFITTED, cuts=(*DEPTH, *MLP)),
    *rivals(),
    Row("cut, distilled, 524k tokens", one_shot(teacher=1.0), TAUGHT[1:], steps=LONG, cuts=(*DEPTH, *MLP)),
    Row(f"{BEST}, 524k tokens", one_shot(True, 0.5), REFITTED[1:], steps=LONG, cuts=(*DEPTH, *MLP)),
)
BY_NAME = {row.name: row for row in ROWS}


def rows_of(cut: str) -> list[Row]:
    """The rows of a cut's table."""
    return [row for row in ROWS if cut in row.cuts]
