"""`PruningPlan`: which structures stay. The one thing that selectors, regularizers, the cut and the export share."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lightprune.anatomy import Anatomy, Shape, Structure, Unit
from lightprune.anatomy.axes import Resize
from lightprune.errors import ConfigError, is_whole
from lightprune.integrations.zero_params import parameter_count
from lightprune.plan import checks as plan_checks
from lightprune.plan.indices import Indices, indices, indices_per_layer, listed

FORMAT_VERSION = 1

_KEPT = ("kept_layers", "kept_heads", "kept_channels", "kept_hidden")


@dataclass(frozen=True)
class PruningPlan:
    """The structures that a model keeps.

    Indices are those of the model that the plan was made for, and ascend. Every layer keeps the same number of heads
    and channels, though not the same ones. A key-value group stays as long as one of its query heads does.

    Attributes:
        model_type: `config.model_type` of that model.
        source: that model's counts.
        kept_layers: the layers that stay.
        kept_heads: for each layer of the source, the query heads that stay; None is all.
        kept_channels: for each layer of the source, the MLP channels that stay; None is all.
        kept_hidden: the hidden dimensions that stay; None is all.
        provenance: how the plan came about (selectors, their settings and scores); plain JSON values.
    """

    model_type: str
    source: Shape
    kept_layers: Indices
    kept_heads: tuple[Indices, ...] | None = None
    kept_channels: tuple[Indices, ...] | None = None
    kept_hidden: Indices | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[Sequence[int]] | None = None,
        channels: Sequence[Sequence[int]] | None = None,
        hidden: Sequence[int] | None = None,
        **provenance: Any,
    ) -> "PruningPlan":
        """The plan that keeps these units of the model that `anatomy` describes, and all of what is left out.

        Nothing is checked: what one selector decides may be possible only together with what another does.
        """
        return cls(
            model_type=anatomy.model_type,
            source=anatomy.shape,
            kept_layers=_ascending(range(anatomy.num_layers) if layers is None else layers),
            kept_heads=_per_layer(heads),
            kept_channels=_per_layer(channels),
            kept_hidden=None if hidden is None else _ascending(hidden),
            provenance=provenance,
        )

    @classmethod
    def keeping(cls, anatomy: Anatomy, **kept: Any) -> "PruningPlan":
        """The same as `of`, checked.

        Raises:
            ConfigError: the model has no such units, or no model of its class could have what is left.
        """
        plan = cls.of(anatomy, **kept)
        plan.validate(anatomy)
        return plan

    @classmethod
    def arriving_at(cls, anatomy: Anatomy, target: Shape) -> "PruningPlan":
        """A plan that ends in the counts `target`, and leaves no fewer parameters than any other. Nothing is checked.

        It keeps the first units of everything; of the layers, which a mixture of experts may have of two sizes, the
        largest.
        """
        source = anatomy.shape
        by_size = sorted(range(source.layers), key=lambda index: -parameter_count(anatomy.layers[index]))
        per_group = target.heads_per_group
        heads = [group * source.heads_per_group + i for group in range(target.kv_groups) for i in range(per_group)]
        return cls.of(
            anatomy,
            layers=sorted(by_size[: target.layers]),
            heads=None if source.heads == target.heads else [heads] * source.layers,
            channels=None if source.channels == target.channels else [range(target.channels)] * source.layers,
            hidden=None if source.hidden == target.hidden else range(target.hidden),
        )

    @classmethod
    def dropping(cls, anatomy: Anatomy, layers: Sequence[int], **provenance: Any) -> "PruningPlan":
        """The plan that removes `layers` from the model that `anatomy` describes.

        Raises:
            ConfigError: the model has no such layers, or none would be left.
        """
        unknown = sorted(set(layers) - set(range(anatomy.num_layers)))
        if unknown:
            raise ConfigError(
                f"Layers {unknown} cannot be dropped: the model's layers are 0 to {anatomy.num_layers - 1}."
            )
        kept = [index for index in range(anatomy.num_layers) if index not in set(layers)]
        return cls.keeping(anatomy, layers=kept, **provenance)

    @property
    def dropped_layers(self) -> Indices:
        """The layers that go."""
        return tuple(i for i in range(self.source.layers) if i not in self.kept_layers)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The structures that the plan removes something of."""
        source, result = self.source, self.shape
        names: tuple[Structure, ...] = ("layers", "heads", "kv_groups", "channels", "hidden")
        return tuple(name for name in names if result.count(name) < source.count(name))

    @property
    def shape(self) -> Shape:
        """The counts of the cut model."""
        first = self.kept_layers[0] if self.kept_layers else 0
        return replace(
            self.source,
            layers=len(self.kept_layers),
            hidden=len(self.kept("hidden", first)),
            heads=len(self.kept("heads", first)),
            kv_groups=len(self.kept("kv_groups", first)),
            channels=len(self.kept("channels", first)),
        )

    def kept(self, unit: Unit, layer: int) -> Sequence[int]:
        """The units of a structure that layer `layer` of the source keeps; hidden dimensions are every layer's."""
        if unit == "kv_groups":
            return sorted({head // self.source.heads_per_group for head in self.kept("heads", layer)})
        if unit == "hidden":
            chosen = self.kept_hidden
        else:
            of_layers = self.kept_heads if unit == "heads" else self.kept_channels
            chosen = None if of_layers is None else of_layers[layer]
        return range(self.source.count(unit)) if chosen is None else chosen

    def removed(self, unit: Unit, layer: int) -> list[int]:
        """The units of a structure that layer `layer` of the source loses."""
        kept = set(self.kept(unit, layer))
        return [index for index in range(self.source.count(unit)) if index not in kept]

    def merged(self, other: "PruningPlan") -> "PruningPlan":
        """What this plan and another for the same model both keep; provenances are kept apart."""
        assert (self.model_type, self.source) == (other.model_type, other.source)

        def both(unit: Unit, layer: int) -> Indices:
            theirs = set(other.kept(unit, layer))
            return tuple(index for index in self.kept(unit, layer) if index in theirs)

        def any_chosen(name: str) -> bool:
            return getattr(self, name) is not None or getattr(other, name) is not None

        layers = range(self.source.layers)
        parts = [*self.provenance.get("parts", [dict(self.provenance)]), dict(other.provenance)]
        return replace(
            self,
            kept_layers=tuple(layer for layer in self.kept_layers if layer in other.kept_layers),
            kept_heads=tuple(both("heads", layer) for layer in layers) if any_chosen("kept_heads") else None,
            kept_channels=tuple(both("channels", layer) for layer in layers) if any_chosen("kept_channels") else None,
            kept_hidden=both("hidden", 0) if any_chosen("kept_hidden") else None,
            provenance={"parts": parts},
        )

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """This plan and one for the model that it leaves, as a single plan for this one's source."""
        assert later.source == self.shape
        new_index = {old: new for new, old in enumerate(self.kept_layers)}

        def of_layer(unit: Unit, layer: int) -> Indices:
            kept = self.kept(unit, layer)
            # A layer that is gone by then keeps as many as the others.
            return tuple(kept[i] for i in later.kept(unit, new_index.get(layer, 0)))

        structures = {*self.structures, *later.structures}
        layers = range(self.source.layers)
        return replace(
            self,
            kept_layers=tuple(self.kept_layers[i] for i in later.kept_layers),
            kept_heads=tuple(of_layer("heads", i) for i in layers) if "heads" in structures else None,
            kept_channels=tuple(of_layer("channels", i) for i in layers) if "channels" in structures else None,
            kept_hidden=of_layer("hidden", self.kept_layers[0]) if "hidden" in structures else None,
            provenance={"cuts": [*self.provenance.get("cuts", [dict(self.provenance)]), dict(later.provenance)]},
        )

    def validate(self, anatomy: Anatomy) -> None:
        """Check the plan against an uncut model.

        Raises:
            ConfigError: the plan was made for another model, its indices are impossible, or the model's class cannot
                express the result.
        """
        plan_checks.check_model(self, anatomy)
        self.check_indices()
        plan_checks.check_result(self, anatomy)

    def check_indices(self) -> None:
        """Check the plan against the counts that it states itself; its shape and structures can be told then.

        Raises:
            ConfigError: its indices are impossible for a model of these counts.
        """
        plan_checks.check_indices(self)

    def config(self, anatomy: Anatomy) -> PretrainedConfig:
        """The Hugging Face config of the cut model, as a new object.

        The model may be cut or uncut: the counts come from the plan alone.
        """
        config = copy.deepcopy(anatomy.lm.config)
        apply_to_config(config, self, anatomy)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {
            "format": FORMAT_VERSION,
            "model_type": self.model_type,
            "source": asdict(self.source),
            **{name: listed(value) for name, value in kept.items()},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningPlan":
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a field is missing or unknown, of the wrong type, or of another format version.
        """
        expected = {"format", *(entry.name for entry in fields(cls))}
        if not isinstance(values, Mapping) or set(values) != expected:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(f"A pruning plan has exactly the fields {sorted(expected)}; this one has {found}.")
        if values["format"] != FORMAT_VERSION:
            raise ConfigError(
                f"The pruning plan's `format` is {values['format']!r}; this version reads {FORMAT_VERSION}."
            )
        for name, kind, means in (("model_type", str, "a string"), ("provenance", Mapping, "an object")):
            if not isinstance(values[name], kind):
                raise ConfigError(f"The pruning plan's `{name}` must be {means}; it is {values[name]!r}.")
        counts = {entry.name for entry in fields(Shape)}
        source = values["source"]
        stated = isinstance(source, Mapping) and set(source) == counts
        if not stated or not all(is_whole(count) and count > 0 for count in source.values()):
            raise ConfigError(
                f"The pruning plan's `source` must state whole numbers above 0 for {sorted(counts)}; it is {source!r}."
            )
        return cls(
            model_type=values["model_type"],
            source=Shape(**source),
            kept_layers=indices("kept_layers", values["kept_layers"]),
            kept_heads=indices_per_layer("kept_heads", values["kept_heads"]),
            kept_channels=indices_per_layer("kept_channels", values["kept_channels"]),
            kept_hidden=None if values["kept_hidden"] is None else indices("kept_hidden", values["kept_hidden"]),
            provenance=dict(values["provenance"]),
        )

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read what `to_json` wrote.

        Raises:
            ConfigError: `text` is not a pruning plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The pruning plan is not valid JSON: {error}.") from error
        return cls.from_dict(values)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan from a JSON file.

        Raises:
            ConfigError: there is no such file, or it is not a pruning plan.
        """
        if not isinstance(path, str | Path) or not Path(path).is_file():
            raise ConfigError(f"There is no pruning plan at {str(path)!r}: name an existing JSON file in `path`.")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"The file {str(path)!r} is no pruning plan, for it holds no text: name a JSON file in `path`."
            ) from error
        return cls.from_json(text)


def apply_to_config(config: PretrainedConfig, plan: PruningPlan, anatomy: Anatomy) -> None:
    """Make the model's config, or a copy of it, state the plan's counts, in place."""
    family, shape, whole = anatomy.family, plan.shape, config
    config = whole.get_text_config()
    if config.num_hidden_layers == plan.source.layers:  # else these speak of the kept layers already
        for name in family.per_layer_fields:
            entries = getattr(config, name, None)
            if entries is not None:
                setattr(config, name, [entries[i] for i in plan.kept_layers])
        family.configure(whole, Resize(plan.source, shape, tuple(plan.kept_layers)))
    config.num_hidden_layers = shape.layers
    if {"heads", "hidden", "channels"} & set(plan.structures):
        config.hidden_size = shape.hidden
        config.num_attention_heads = shape.heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = shape.kv_groups
        if family.head_dim_field is not None:
            setattr(config, family.head_dim_field, shape.head_dim)
        if "channels" in family.structures:
            setattr(config, family.channels_field, shape.channels)


def _ascending(kept: Sequence[int]) -> Indices:
    return tuple(sorted(int(index) for index in kept))  # `int`: NumPy's integers are no JSON


def _per_layer(kept: Sequence[Sequence[int]] | None) -> tuple[Indices, ...] | None:
    return None if kept is None else tuple(_ascending(entry) for entry in kept)
