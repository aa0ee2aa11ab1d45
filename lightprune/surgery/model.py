"""The cut itself: a model and a plan in, the smaller model out."""

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy import Anatomy, Shape
from lightprune.anatomy.axes import Axis, length, rows_of
from lightprune.anatomy.base import STATED_COUNTS, Axes, Site
from lightprune.integrations.zero_params import gathered, partition_like
from lightprune.plan import PruningPlan, apply_to_config

# What of a parameter stays: for each dimension the indices, or None for all of it.
Rows = tuple[Tensor | None, ...]
OnReplace = Callable[[nn.Parameter, nn.Parameter, Rows], None]


def cut_model(anatomy: Anatomy, plan: PruningPlan, on_replace: OnReplace | None = None) -> None:
    """Execute `plan` on the model, in place.

    Parameters that lose nothing are the very same objects afterwards. The others are replaced one by one, so that no
    more than one of them is held twice. Hooks on the layers and replaced `forward`s must be gone before. The model gets
    a config of its own: a teacher that was built from the same one keeps it.

    Args:
        anatomy: of the model to cut.
        plan: what stays.
        on_replace: called as `on_replace(old, new, rows)` for each parameter that is replaced, tied ones once.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    plan.validate(anatomy)
    _cut_width(anatomy, plan, on_replace)
    _cut_depth(anatomy, plan)
    _own_config(anatomy.lm)
    apply_to_config(anatomy.lm.config, plan, anatomy)


def _own_config(lm: PreTrainedModel) -> None:
    """Replace the config of all of a model's modules by a copy: `transformers` builds models on the one it is given."""
    copies: dict[int, Any] = {}  # of the config and of those inside it, by the identity of what is copied
    copy.deepcopy(lm.config, copies)
    for module in lm.modules():
        own = copies.get(id(getattr(module, "config", None)))
        if isinstance(own, PretrainedConfig):
            module.config = own  # type: ignore[assignment]


def sliced(tensor: Tensor, rows: Rows) -> Tensor:
    """What of a tensor stays, in storage of its own."""
    for dimension, indices in enumerate(rows):
        if indices is not None:
            tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor


def kept_rows(axes: Axes, plan: PruningPlan, layer: int | None) -> Rows:
    """For each axis of a parameter of layer `layer` (None: outside the layers), the indices that stay."""
    return tuple(None if axis is None else _kept_of_axis(axis, plan, layer or 0) for axis in axes)


def _kept_of_axis(axis: Axis, plan: PruningPlan, layer: int) -> Tensor | None:
    if not any(plan.removed(run.unit, layer) for run in axis):
        return None
    offset, rows = 0, []
    for run in axis:
        rows.append(rows_of(plan.kept(run.unit, layer), run.rows(plan.source), offset))
        offset += run.rows(plan.source) * plan.source.count(run.unit)
    return torch.cat(rows)


def _cut_width(anatomy: Anatomy, plan: PruningPlan, on_replace: OnReplace | None) -> None:
    tied: dict[nn.Parameter, nn.Parameter] = {}
    for site in anatomy.sites():
        if site.layer is not None and site.layer not in plan.kept_layers:
            continue
        for weight in site.weights():
            old, rows = weight.parameter, kept_rows(weight.axes, plan, site.layer)
            if all(indices is None for indices in rows):
                continue
            new = tied.get(old)
            if new is None:
                new = nn.Parameter(sliced(gathered(old), rows), requires_grad=old.requires_grad)
                partition_like(new, old)
                if on_replace is not None:
                    on_replace(old, new, rows)
            if site.layer is None:
                tied[old] = new
            setattr(site.module, weight.name, new)
        _restate(site, plan.shape)
    for module in anatomy.decoder.modules():
        for name, count in STATED_COUNTS.items():
            if vars(module).get(name) == count(plan.source):
                setattr(module, name, count(plan.shape))


def _restate(site: Site, shape: Shape) -> None:
    """Bring what a module says of its own size up to date."""
    module, lengths = site.module, [None if axis is None else length(axis, shape) for axis in site.axes]
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (lengths[0],)  # type: ignore[assignment]
        return
    names = {nn.Linear: ("out_features", "in_features"), Conv1D: ("nf", "nx"), nn.Embedding: ("", "embedding_dim")}
    for kind, attributes in names.items():
        if isinstance(module, kind):
            for attribute, size in zip(attributes, lengths, strict=True):
                if size is not None:
                    setattr(module, attribute, size)


def _cut_depth(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Edit the list of layers in place: other names for it, and what other tools keep on it, stay valid."""
    layers = anatomy.layers
    for index in reversed(plan.dropped_layers):
        del layers[index]
    for new, old in enumerate(plan.kept_layers):
        _renumber(anatomy, layers[new], old, new)


def _renumber(anatomy: Anatomy, layer: nn.Module, old: int, new: int) -> None:
    for path in anatomy.family.layer_index:
        owner, _, attribute = path.rpartition(".")
        setattr(attrgetter(owner)(layer) if owner else layer, attribute, new)
    anatomy.family.renumber(layer, old, new)
