"""What all selectors of width are: how many heads, channels and hidden dimensions stay, and which by their scores."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightprune.anatomy import Shape, Structure, Unit
from lightprune.errors import ConfigError, check_number
from lightprune.importance.ranking import highest, highest_heads, of_groups, rounded, spread
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.base import Selector
from lightprune.selectors.counts import Counts, Keep, serving_advice
from lightprune.selectors.target import Target


class UnitSelector(Selector):
    """Decides which query heads, key-value groups, MLP channels and hidden dimensions stay: those that score highest.

    Each of the four says how many **stay**: a whole number is a count, a number between 0 and 1 a ratio of what is
    there, None keeps them all. Every layer keeps as many, chosen among its own; hidden dimensions are chosen once.
    A ratio becomes the nearest count that is possible, neither none nor all: heads go by multiples of the key-value
    groups that stay, channels and hidden dimensions by `multiple_of`.

    Args:
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes and the plan is made.
        hold_weights: let the module's weights stand still in the window.
        heads: query heads a layer, the same number in every key-value group; None keeps all of each group that stays.
            Where every query head has a key-value head of its own, the one goes with the other.
        kv_groups: key-value heads a layer, each with its query heads; a group scores what its heads score together,
            unless the selector scores groups themselves.
        channels: MLP channels a layer.
        hidden: hidden dimensions.
        multiple_of: ratios of channels and hidden dimensions are rounded to the nearest multiple of this.
        target: in place of counts, what the model must come out within.
    """

    def __init__(
        self,
        *,
        start: Steps,
        stop: Steps,
        hold_weights: bool,
        heads: Keep = None,
        kv_groups: Keep = None,
        channels: Keep = None,
        hidden: Keep = None,
        multiple_of: int = 64,
        target: Target | None = None,
    ) -> None:
        super().__init__(start, stop, hold_weights)
        self.budget = target
        self.counts = Counts(type(self).__name__, heads, kv_groups, channels, hidden, multiple_of)

    @abstractmethod
    def scores(self) -> Mapping[Unit, Tensor]:
        """The scores of every unit of each structure of `units`, the higher the better: [L, n], hidden [d].

        Key-value groups may be given scores of their own, "kv_groups" [L, G].
        """

    @property
    def settings(self) -> dict[str, Any]:
        """How the units were scored, for the plan's provenance: plain JSON values."""
        return {}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The structures whose units are scored; key-value groups follow from their heads."""
        return self.counts.units if self.budget is None else self.budget.units()

    @property
    def structures(self) -> frozenset[Structure]:
        units = self.units
        return frozenset({*units, "kv_groups"} if "heads" in units else units)

    def target(self, source: Shape) -> Shape:
        if self.budget is None:
            return self.counts.of(source)
        name = type(self).__name__
        if self.counts.units:
            raise ConfigError(
                f"{name}.target is set, and counts beside it: leave out either `target`, or `heads`, `kv_groups`, "
                "`channels` and `hidden`."
            )
        check_number(self, "multiple_of", self.counts.multiple_of, whole=True, least=1)
        others, multiple = self.left_by_others(source), self.counts.multiple_of
        shape = self.budget.shape(name, self.pipeline.anatomy, source, others, "channels", multiple)
        return replace(shape, layers=source.layers)

    def check(self) -> None:
        super().check()
        source = self.expected_source()
        if source is None:
            return
        target = self.target(source)
        if target == source:
            rank_zero_warn(f"{type(self).__name__} keeps all that the model has: its counts say what stays.")
        for advice in serving_advice(source, target):
            rank_zero_warn(f"{type(self).__name__}: {advice}")

    def choose(self) -> PruningPlan:
        scores = self.scores()
        for unit, values in scores.items():
            for layer, of_layer in enumerate(values) if values.ndim > 1 else [(None, values)]:
                prefix = f"select/{unit}" if layer is None else f"select/{unit}/layer_{layer:02d}"
                self.pipeline.log({f"{prefix}/{name}": value for name, value in spread(of_layer).items()})
        return self.keep(scores, **self.settings, scores={unit: rounded(values) for unit, values in scores.items()})

    def keep(self, scores: Mapping[Unit, Tensor], /, **provenance: Any) -> PruningPlan:
        """The plan that keeps the units that score highest; of equal ones the earlier stay."""
        anatomy = self.pipeline.anatomy
        source = anatomy.shape
        target = self.target(source)
        scores = {unit: values.cpu() for unit, values in scores.items()}
        heads = channels = hidden = None
        if target.heads < source.heads:
            groups = scores.get("kv_groups", of_groups(scores["heads"], source.heads_per_group))
            heads = [highest_heads(*of_layer, target) for of_layer in zip(scores["heads"], groups, strict=True)]
        if target.channels < source.channels:
            channels = [highest(of_layer, target.channels) for of_layer in scores["channels"]]
        if target.hidden < source.hidden:
            hidden = highest(scores["hidden"], target.hidden)
        return PruningPlan.of(anatomy, heads=heads, channels=channels, hidden=hidden, **provenance)

    def status(self) -> Status:
        if self.plan is None:
            return {}
        shape = self.plan.shape
        return {structure: shape.count(structure) for structure in self.plan.structures}
