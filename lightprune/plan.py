"""`PruningPlan`: which structures stay. The one thing that selectors, regularizers, the cut and the export share."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lightprune.anatomy import Anatomy
from lightprune.errors import ConfigError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """The structures that a model keeps.

    Attributes:
        model_type: `config.model_type` of the model that the plan was made for.
        num_layers: how many layers that model has.
        hidden_size: its width, so that a plan is not mistaken for that of a sibling.
        kept_layers: indices of the layers that stay, ascending.
        provenance: how the plan came about (selector, its settings, its scores round by round); plain JSON values.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    kept_layers: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
        plan = cls(
            model_type=anatomy.model_type,
            num_layers=anatomy.num_layers,
            hidden_size=anatomy.config.hidden_size,
            kept_layers=tuple(i for i in range(anatomy.num_layers) if i not in set(layers)),
            provenance=provenance,
        )
        plan.validate(anatomy)
        return plan

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Indices of the layers that go, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.kept_layers)

    def validate(self, anatomy: Anatomy) -> None:
        """Check the plan against an uncut model.

        Raises:
            ConfigError: the plan was made for another model, or its `kept_layers` are impossible.
        """
        for name, ours, theirs in (
            ("model_type", self.model_type, anatomy.model_type),
            ("num_layers", self.num_layers, anatomy.num_layers),
            ("hidden_size", self.hidden_size, anatomy.config.hidden_size),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"The plan was made for another model: its `{name}` is {ours!r}, the model's is {theirs!r}; "
                    "choose the plan or the model that belongs to the other."
                )
        kept = self.kept_layers
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_layers:
            raise ConfigError(
                f"The plan's `kept_layers` are {list(kept)}: they must be at least one distinct index from 0 to "
                f"{self.num_layers - 1}, ascending."
            )

    def config(self, anatomy: Anatomy) -> PretrainedConfig:
        """The Hugging Face config of the cut model, as a new object.

        The model may be cut or uncut: the counts come from the plan alone.
        """
        config = copy.deepcopy(anatomy.config)
        apply_to_config(config, self, anatomy)
        return config

    def num_parameters(self, anatomy: Anatomy) -> int:
        """How many parameters the model that `anatomy` describes has once the plan is executed on it."""
        return anatomy.num_parameters - sum(anatomy.parameters_of_layer(i) for i in self.dropped_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {
            "format": FORMAT_VERSION,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "kept_layers": list(self.kept_layers),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningPlan":
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a field is missing or unknown, of the wrong type, or of another format version.
        """
        expected = {"format", "model_type", "num_layers", "hidden_size", "kept_layers", "provenance"}
        if not isinstance(values, Mapping) or set(values) != expected:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(f"A pruning plan has exactly the fields {sorted(expected)}; this one has {found}.")
        if values["format"] != FORMAT_VERSION:
            raise ConfigError(
                f"The pruning plan's `format` is {values['format']!r}; this version reads {FORMAT_VERSION}."
            )
        kept = values["kept_layers"]
        counts = (values["num_layers"], values["hidden_size"])
        if not isinstance(kept, list) or not all(type(number) is int for number in (*kept, *counts)):
            raise ConfigError(
                "The pruning plan's `num_layers` and `hidden_size` must be whole numbers and its `kept_layers` a list "
                f"of them; they are {counts[0]!r}, {counts[1]!r} and {kept!r}."
            )
        return cls(
            model_type=values["model_type"],
            num_layers=values["num_layers"],
            hidden_size=values["hidden_size"],
            kept_layers=tuple(kept),
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
        if not Path(path).is_file():
            raise ConfigError(f"There is no pruning plan at {str(path)!r}: name an existing JSON file in `path`.")
        return cls.from_json(Path(path).read_text())


def apply_to_config(config: PretrainedConfig, plan: PruningPlan, anatomy: Anatomy) -> None:
    """Make a config state the plan's counts, in place: the model's modules share one config object."""
    for name in anatomy.family.per_layer_fields:
        entries = getattr(config, name, None)
        if entries is not None and len(entries) == plan.num_layers:
            setattr(config, name, [entries[i] for i in plan.kept_layers])
    setattr(config, anatomy.family.depth_field, len(plan.kept_layers))
