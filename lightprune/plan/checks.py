"""Whether a pruning plan can be carried out: on this model, with these indices, within the model's own class."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

from lightprune.anatomy import Anatomy, Shape, Structure, Unit
from lightprune.anatomy.shape_rules import even_groups, nearest
from lightprune.errors import ConfigError
from lightprune.plan.indices import Indices, shortened


class Plan(Protocol):
    """A pruning plan, as the checks read it: see `PruningPlan`."""

    @property
    def model_type(self) -> str: ...

    @property
    def source(self) -> Shape: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def structures(self) -> tuple[Structure, ...]: ...

    @property
    def kept_layers(self) -> Indices: ...

    @property
    def kept_heads(self) -> tuple[Indices, ...] | None: ...

    @property
    def kept_channels(self) -> tuple[Indices, ...] | None: ...

    @property
    def kept_hidden(self) -> Indices | None: ...

    def kept(self, unit: Unit, layer: int) -> Sequence[int]:
        """The indices of the units that stay."""


def check_model(plan: Plan, anatomy: Anatomy) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        ConfigError: the model is of another type, or has other counts.
    """
    ours = {"model_type": plan.model_type, **asdict(plan.source)}
    theirs = {"model_type": anatomy.model_type, **asdict(anatomy.shape)}
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(
                f"The plan was made for another model: its `{name}` is {value!r}, the model's is {theirs[name]!r}; "
                "choose the plan or the model that belongs to the other."
            )


def check_result(plan: Plan, anatomy: Anatomy) -> None:
    """Refuse what the model's class cannot express.

    Raises:
        ConfigError: the family loses none of such a structure, or has no model of these counts; says which are near.
    """
    family = anatomy.family
    impossible = sorted(set(plan.structures) - family.structures - {"kv_groups"})
    if impossible:
        raise ConfigError(
            f"{anatomy.model_type} can be pruned in {', '.join(sorted(family.structures))}, and the plan "
            f"removes {', '.join(impossible)}: leave that out of the plan."
        )
    problems = family.problems(plan.shape, anatomy.config)
    if problems and plan.shape != plan.source:
        options = nearest(plan.shape, plan.source, lambda shape: not family.problems(shape, anatomy.config))
        found = [f"{option.heads} heads with {option.hidden} hidden dimensions" for option in options]
        instead = " or ".join(found) or "no smaller model of this class"
        raise ConfigError(
            f"The plan cannot be exported: {'; '.join(problems)} (nearest: {instead}); change the counts to keep."
        )


def check_indices(plan: Plan) -> None:
    """Refuse indices that no model of the plan's own source counts could have.

    Raises:
        ConfigError: they are out of range or order, or differ in number from layer to layer or group to group.
    """
    source = plan.source
    uneven = even_groups(source.heads, source.kv_groups)
    if uneven is not None:
        raise ConfigError(f"The plan's `source` can be no model's: {uneven}; choose another plan.")
    _check_ascending("kept_layers", plan.kept_layers, source.layers)
    _check_per_layer("kept_heads", plan.kept_heads, source.heads, source.layers)
    _check_per_layer("kept_channels", plan.kept_channels, source.channels, source.layers)
    if plan.kept_hidden is not None:
        _check_ascending("kept_hidden", plan.kept_hidden, source.hidden)
    _check_groups(plan)


def _check_ascending(name: str, kept: Indices, count: int) -> None:
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ConfigError(
            f"The plan's `{name}` are {shortened(kept)}: they must be at least one distinct index from 0 to "
            f"{count - 1}, ascending."
        )


def _check_per_layer(name: str, of_layers: tuple[Indices, ...] | None, count: int, layers: int) -> None:
    if of_layers is None:
        return
    if len(of_layers) != layers:
        raise ConfigError(
            f"The plan's `{name}` has {len(of_layers)} entries: it must have one for each of the model's "
            f"{layers} layers."
        )
    for layer, kept in enumerate(of_layers):
        if not kept:
            part = "attention" if name == "kept_heads" else "MLP"
            raise ConfigError(
                f"The plan's `{name}[{layer}]` is empty: no stock class has a layer without its {part}, so keep at "
                "least one, or drop the whole layer."
            )
        _check_ascending(f"{name}[{layer}]", kept, count)
    counts = sorted({len(kept) for kept in of_layers})
    if len(counts) > 1:
        raise ConfigError(
            f"The plan's `{name}` have from {counts[0]} to {counts[-1]} entries a layer: every layer of a stock "
            "model has the same count, so keep as many in each."
        )


def _check_groups(plan: Plan) -> None:
    """Every layer must keep as many key-value groups, and every group as many query heads."""
    if plan.kept_heads is None:
        return
    groups = {len(plan.kept("kv_groups", layer)) for layer in range(plan.source.layers)}
    if len(groups) > 1:
        raise ConfigError(
            f"The plan's `kept_heads` keep from {min(groups)} to {max(groups)} key-value groups a layer: every "
            "layer of a stock model has the same count, so keep as many groups in each."
        )
    for layer, heads in enumerate(plan.kept_heads):
        of_group = [head // plan.source.heads_per_group for head in heads]
        sizes = {of_group.count(group) for group in of_group}
        if len(sizes) > 1:
            uneven = even_groups(len(heads), min(groups)) or (
                f"its groups keep from {min(sizes)} to {max(sizes)} query heads"
            )
            raise ConfigError(
                f"The plan's `kept_heads[{layer}]` are {shortened(heads)}: {uneven}; every key-value head must "
                "serve the same number of query heads."
            )
