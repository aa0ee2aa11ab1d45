"""The schedule of a run: which selectors and which cut make a cycle, and what each cycle leaves of the model."""

from collections.abc import Sequence

from lightprune.anatomy import Anatomy, Shape
from lightprune.errors import ConfigError
from lightprune.pipeline.part import CuttingPart, Cycle, DecidingPart, Part


def place_cuts(parts: Sequence[Part]) -> None:
    """Give a cut without an `at` its step: the one at which the windows of the other parts end.

    Raises:
        ConfigError: there are several cuts, or the window of a part ends at the cut.
    """
    cuts = [part for part in parts if isinstance(part, CuttingPart)]
    for cut in cuts:
        if cut.at is not None:
            continue
        if len(cuts) > 1:
            raise ConfigError(
                f"StructuredCut.at is left out in a run with {len(cuts)} cuts: set `at` of each of them to its step, "
                "or to a share of the run such as 50%."
            )
        waited_for = [(part, part.ends) for part in parts if part is not cut]
        for part, ends in waited_for:
            if ends is None:
                raise ConfigError(
                    f"StructuredCut.at and {type(part).__name__}.stop are both left out: set one of them to its step, "
                    "or to a share of the run such as 75%."
                )
        cut.at = max((ends or 0 for _, ends in waited_for), default=0)


def cycles_of(selectors: Sequence[DecidingPart], cuts: Sequence[CuttingPart]) -> list[Cycle]:
    """Every selector to the first cut that comes after its window has opened; without cuts, one cycle that selects.

    A selector that needs no batches decides at once: one that starts at the very step of a cut belongs to that cut.
    """
    ordered = sorted(cuts, key=lambda cut: cut.at)
    cycles = [Cycle(index, cut) for index, cut in enumerate(ordered)] or [Cycle(0, None)]
    for selector in selectors:
        later = [
            cycle
            for cycle in cycles
            if cycle.cut is None or cycle.cut.at > selector.start or selector.start == selector.stop == cycle.cut.at
        ]
        (later or cycles[-1:])[0].selectors.append(selector)
    return cycles


def doomed_layers(selectors: Sequence[DecidingPart], num_layers: int) -> Sequence[int]:
    """The layers that may go: those of a plan that is known already, or else all that are not protected."""
    deciding = [selector for selector in selectors if "layers" in selector.structures]
    if not deciding:
        return ()
    plan = deciding[0].foresee() if len(deciding) == 1 and deciding[0].cycle.index == 0 else None
    if plan is not None:
        return plan.dropped_layers
    first, last = (min(counts) for counts in zip(*(selector.protected for selector in deciding), strict=True))
    return range(first, num_layers - last)


def unfinished(cycles: Sequence[Cycle], step: int) -> str | None:
    """What a run that ended after `step` optimizer steps did not reach, in a sentence; None if it did everything."""
    longer = "let the run train longer (the data, early stopping, trainer.max_epochs or trainer.max_time ended it)"
    for cycle in cycles:
        if cycle.cut is not None and not cycle.done:
            return (
                f"The run ended at step {step}, before the cut at step {cycle.cut.at}, so this cut was not made: "
                f"{longer}, or set StructuredCut.at to at most {step}."
            )
        late = next((selector for selector in cycle.selectors if selector.plan is None), None)
        if late is not None:
            name = type(late).__name__
            return (
                f"The run ended at step {step}, before {name} decided at step {late.stop}, so there is no plan: "
                f"{longer}, or let {name} stop at step {step} at the latest."
            )
    return None


def expected_shapes(cycles: Sequence[Cycle], anatomy: Anatomy) -> list[Shape]:
    """The model's shape before each cycle, and after the last.

    Raises:
        ConfigError: see `Cycle.target`.
    """
    shapes = [anatomy.shape]
    for cycle in cycles:
        shapes.append(cycle.target(shapes[-1]))
    return shapes
