"""How a model must come out, as a selector's setting: a budget, and the largest shape within it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lightprune.anatomy import Anatomy, Shape, Structure, Unit
from lightprune.costs import Workload, costs_at_most
from lightprune.errors import ConfigError, check_number
from lightprune.selectors.budget import Cost, shape_within, shrinkable, smallest, widened
from lightprune.surgery import parameters_in_shape

_MEASURES = ("parameters", "flops", "memory")


@dataclass(frozen=True)
class Target:
    """What the whole model may come to after the cut; what other selectors take away at the same cut counts too.

    Exactly one of the three budgets is set. A number below 1 is a share of what the model has before the cut.

    Attributes:
        parameters: how many, tied ones once.
        flops: of reading a prompt, see `lightprune.costs.costs_of`.
        memory: bytes of weights and KV cache.
        structures: what shrinks, all by about the same ratio; MLP channels then take up what is left of the budget.
            None is "layers" for selectors of layers, and "channels" for selectors of width.
        prompt: tokens of a prompt.
        context: tokens in the KV cache, of each sequence.
        batch_size: sequences beside each other.
        dtype: of weights and KV cache where the model serves; None is that of the model.
    """

    parameters: int | float | None = None
    flops: int | float | None = None
    memory: int | float | None = None
    structures: Sequence[Structure] | None = None
    prompt: int = 512
    context: int = 2048
    batch_size: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def units(self) -> tuple[Unit, ...]:
        """The structures of width whose units must be scored; key-value groups follow from their heads."""
        shrinking = {"heads" if name == "kv_groups" else name for name in self.structures or ("channels",)}
        scored: tuple[Unit, ...] = ("heads", "channels", "hidden")
        return tuple(unit for unit in scored if unit in shrinking)

    def shape(
        self, owner: str, anatomy: Anatomy, source: Shape, others: Shape, otherwise: Structure, multiple_of: int
    ) -> Shape:
        """The largest shape within the budget.

        Args:
            owner: the selector, for what errors say.
            anatomy: of the model.
            source: its counts before the cut.
            others: what other selectors leave of them.
            otherwise: what shrinks where `structures` is None.
            multiple_of: what counts of channels and hidden dimensions are multiples of, if they change.

        Raises:
            ConfigError: the settings contradict one another, or there is no such shape.
        """
        measure, wanted = self._measure(owner)
        allowed = [name for name in shrinkable(anatomy) if (name == "layers") == (otherwise == "layers")]
        structures = list(self.structures or (otherwise,))
        wrong = [structure for structure in structures if structure not in allowed]
        if wrong:
            raise ConfigError(
                f"{owner}.target.structures is {structures}: here {anatomy.model_type} can shrink in "
                f"{', '.join(allowed) or 'nothing'}; choose among these."
            )
        served = Workload.of(f"{owner}.target", self.prompt, self.context, self.batch_size, self.dtype)
        cost = _cost(measure, anatomy, served)
        budget = int(wanted * cost(source)) if wanted < 1 else int(wanted)
        shape = shape_within(anatomy, others, budget, cost, structures, multiple_of)
        if shape is None:
            least = cost(smallest(anatomy, others, structures, multiple_of))
            raise ConfigError(
                f"{owner}.target.{measure} is {wanted}, which is {budget:,}, and with {', '.join(structures)} the "
                f"model can shrink to {least:,} at the least: raise `{measure}`, or add to what shrinks."
            )
        return widened(shape, others, budget, cost, multiple_of) if "channels" in structures else shape

    def _measure(self, owner: str) -> tuple[str, int | float]:
        given = {name: value for name in _MEASURES if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ConfigError(
                f"{owner}.target sets {', '.join(given) or 'no budget'}: set exactly one of {', '.join(_MEASURES)}."
            )
        ((name, value),) = given.items()
        check_number(f"{owner}.target", name, value, above=0)
        if value >= 1 and value != int(value):
            raise ConfigError(f"{owner}.target.{name} is {value}: it must be a whole number, or a share below 1.")
        return name, value


def _cost(measure: str, anatomy: Anatomy, served: Workload) -> Cost:
    if measure == "parameters":
        return partial(parameters_in_shape, anatomy)
    if measure == "flops":
        return lambda shape: costs_at_most(anatomy, shape, served).prefill
    return lambda shape: costs_at_most(anatomy, shape, served).memory
