"""A cycle: the selectors that decide one plan, and the cut that executes it. A run has as many as it has cuts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightprune.anatomy import Anatomy, Shape
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan

if TYPE_CHECKING:
    from lightprune.cut import StructuredCut
    from lightprune.regularizers.base import Regularizer
    from lightprune.selectors.base import Selector


@dataclass(eq=False)
class Cycle:
    """One pass of select, regularize, cut.

    Attributes:
        index: its place in the run, from 0.
        selectors: who decides the plan, each about structures of its own.
        cut: who executes it; None in a run that only selects.
    """

    index: int
    cut: "StructuredCut | None"
    selectors: "list[Selector]" = field(default_factory=list)
    _merged: tuple[list[PruningPlan], PruningPlan] | None = None

    @property
    def plan(self) -> PruningPlan | None:
        """What the selectors decided together; None until the last of them has."""
        plans = [selector.plan for selector in self.selectors if selector.plan is not None]
        if not plans or len(plans) < len(self.selectors):
            return None
        if self._merged is None or any(new is not old for new, old in zip(plans, self._merged[0], strict=True)):
            merged = plans[0]
            for other in plans[1:]:
                merged = merged.merged(other)
            self._merged = plans, merged
        return self._merged[1]

    @property
    def selected_by(self) -> int:
        """The optimizer step by which the plan is decided."""
        return max((selector.stop for selector in self.selectors), default=0)

    @property
    def done(self) -> bool:
        """Whether its cut is made."""
        return self.cut is not None and self.cut.done

    def target(self, source: Shape) -> Shape:
        """The counts that this cycle leaves of a model of shape `source`.

        Raises:
            ConfigError: two selectors decide about the same, or the settings of one do not fit such a model.
        """
        claimed: dict[str, Selector] = {}
        shape = source
        for selector in self.selectors:
            for structure in selector.structures:
                rival = claimed.setdefault(structure, selector)
                if rival is not selector:
                    raise ConfigError(
                        f"{type(rival).__name__} and {type(selector).__name__} both select {structure}: "
                        "leave one of them in trainer.callbacks, or let the second one start after the first one's "
                        "cut, with a cut of its own."
                    )
            shape = smaller(shape, selector.target(source))
        return shape


def smaller(left: Shape, right: Shape) -> Shape:
    """What two plans for one model leave together: of every count, the smaller one."""
    return Shape(**{name: min(count, getattr(right, name)) for name, count in vars(left).items()})


def place_cuts(
    cuts: "Sequence[StructuredCut]", selectors: "Sequence[Selector]", regularizers: "Sequence[Regularizer]"
) -> None:
    """Give a cut without an `at` its step: the one at which the selection and the regularizers' windows end.

    Raises:
        ConfigError: there are several cuts, or a regularizer's window ends at the cut.
    """
    for cut in cuts:
        if cut.at is not None:
            continue
        if len(cuts) > 1:
            raise ConfigError(
                f"StructuredCut.at is left out in a run with {len(cuts)} cuts: set `at` of each of them to its step, "
                "or to a share of the run such as 50%."
            )
        for regularizer in regularizers:
            if regularizer.stop is None:
                raise ConfigError(
                    f"StructuredCut.at and {type(regularizer).__name__}.stop are both left out: set one of them to its "
                    "step, or to a share of the run such as 75%."
                )
        cut.at = max([part.stop or 0 for part in (*selectors, *regularizers)], default=0)


def cycles_of(selectors: "Sequence[Selector]", cuts: "Sequence[StructuredCut]") -> list[Cycle]:
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


def expected_shapes(cycles: Sequence[Cycle], anatomy: Anatomy) -> list[Shape]:
    """The model's shape before each cycle, and after the last.

    Raises:
        ConfigError: see `Cycle.target`.
    """
    shapes = [anatomy.shape]
    for cycle in cycles:
        shapes.append(cycle.target(shapes[-1]))
    return shapes
