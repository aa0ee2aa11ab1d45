"""How many units stay: counts and ratios, as a user writes them, and the shape of a model that they lead to."""

import math
from dataclasses import dataclass, replace

from lightprune.anatomy import Shape, Unit
from lightprune.anatomy.shape_rules import even_groups
from lightprune.errors import ConfigError, check_number, is_whole

Keep = int | float | None


@dataclass(frozen=True)
class Counts:
    """How many units of each structure stay: a count, a ratio in (0, 1) of what is there, or None where none goes.

    Attributes:
        owner: who asks, for what errors say.
        heads: query heads a layer.
        kv_groups: key-value heads a layer.
        channels: MLP channels a layer.
        hidden: hidden dimensions.
        multiple_of: what ratios of channels and hidden dimensions are rounded to.
        layers: decoder layers.
    """

    owner: str
    heads: Keep
    kv_groups: Keep
    channels: Keep
    hidden: Keep
    multiple_of: int
    layers: Keep = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The structures whose units must be scored; key-value groups follow from their heads."""
        scored: dict[Unit, bool] = {
            "heads": self.heads is not None or self.kv_groups is not None,
            "channels": self.channels is not None,
            "hidden": self.hidden is not None,
        }
        return tuple(unit for unit, asked in scored.items() if asked)

    def of(self, source: Shape) -> Shape:
        """What stays of a model of shape `source`.

        Raises:
            ConfigError: nothing is asked for, or what is does not fit such a model.
        """
        if not self.units and self.layers is None:
            raise ConfigError(
                f"{self.owner} selects nothing: set at least one of `heads`, `kv_groups`, `channels` and `hidden`."
            )
        check_number(self.owner, "multiple_of", self.multiple_of, whole=True, least=1)
        heads, kv_groups = self._attention(source)
        return replace(
            source,
            layers=self._count("layers", self.layers, source.layers, 1),
            heads=heads,
            kv_groups=kv_groups,
            channels=self._count("channels", self.channels, source.channels, self.multiple_of),
            hidden=self._count("hidden", self.hidden, source.hidden, self.multiple_of),
        )

    def _attention(self, source: Shape) -> tuple[int, int]:
        if self.kv_groups is None and source.heads_per_group == 1:  # a head is its own key-value group
            heads = self._count("heads", self.heads, source.heads, 1)
            return heads, heads
        groups = self._count("kv_groups", self.kv_groups, source.kv_groups, 1)
        most = groups * source.heads_per_group
        if self.heads is None:
            return most, groups
        heads = self._count("heads", self.heads, source.heads, groups)
        if isinstance(self.heads, float):
            return min(heads, most), groups
        if heads > most:
            raise ConfigError(
                f"{self.owner}.heads is {heads}, and the {groups} key-value heads that stay serve at most {most} query "
                f"heads, {source.heads_per_group} each: lower `heads` to at most {most}, or keep more `kv_groups`."
            )
        uneven = even_groups(heads, groups)
        if uneven is not None:
            raise ConfigError(f"{self.owner}.heads is {heads}: {uneven}; change `heads` or `kv_groups`.")
        return heads, groups

    def _count(self, name: str, keep: Keep, there: int, multiple: int) -> int:
        """How many of the units that are `there` stay."""
        if keep is None:
            return there
        if isinstance(keep, float):
            return self._rounded(name, keep, there, multiple)
        if not is_whole(keep) or not 1 <= keep <= there:
            raise ConfigError(
                f"{self.owner}.{name} is {keep!r}: the model has {there}, so `{name}` must be a count from 1 to "
                f"{there}, or a ratio between 0 and 1."
            )
        return keep

    def _rounded(self, name: str, ratio: float, there: int, multiple: int) -> int:
        """The multiple nearest to a ratio of what is there, never none and never all."""
        if not 0 < ratio < 1:
            raise ConfigError(
                f"{self.owner}.{name} is {ratio}: a ratio must lie between 0 and 1; write a count as a whole number."
            )
        most = (there - 1) // multiple
        if most < 1:
            other = {"heads": "keep fewer `kv_groups`", "kv_groups": "leave it out", "layers": "leave it out"}.get(
                name, "lower `multiple_of`"
            )
            raise ConfigError(
                f"{self.owner}.{name} is {ratio}: the model has {there}, and below that there is no multiple of "
                f"{multiple} to round to; set `{name}` to a count, or {other}."
            )
        return multiple * min(max(math.floor(ratio * there / multiple + 0.5), 1), most)


def serving_advice(source: Shape, target: Shape) -> list[str]:
    """Why servers that split a model over devices may not run the counts that a cut leaves, or run them slowly."""
    advice = []
    if target.channels != source.channels and target.channels % 64:
        advice.append(
            f"{target.channels} MLP channels are no multiple of 64: servers that split a model over devices (tensor "
            "parallelism) and fast kernels want one."
        )
    if target.kv_groups != source.kv_groups and target.kv_groups % 2 and target.kv_groups > 1:
        advice.append(
            f"{target.kv_groups} key-value heads are odd: servers that split a model over devices (tensor parallelism) "
            "want a number that the devices divide."
        )
    return advice
