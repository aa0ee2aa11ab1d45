"""Values of units: every layer, head, channel and hidden dimension counts for as much as its value says.

Shapes: d hidden dimensions, H query heads, I MLP channels, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, KV_GROUPS, Axis
from lightprune.anatomy.base import Site, Writer
from lightprune.importance.norms import norm_over
from lightprune.integrations.zero_params import Edited
from lightprune.masks.gates import Bypass, Handle, ReplacedForward, change_input, change_output, remove_all


@dataclass(frozen=True)
class Values:
    """The value of every unit, in [0, 1]; 0 is closed. At least float32; None for a structure that is left alone.

    Attributes:
        layers: [L], of what a layer's attention and MLP add to the residual stream.
        heads: [L, H], of the query heads; a key-value group is closed if all of its heads are.
        channels: [L, I].
        hidden: [d].
    """

    layers: Tensor | None = None
    heads: Tensor | None = None
    channels: Tensor | None = None
    hidden: Tensor | None = None

    def leaves(self) -> "Values":
        """The same values, cut off from what they were computed from; gradients end in them."""
        return Values(*(None if v is None else v.detach().requires_grad_() for v in self._tensors()))

    def pairs(self, other: "Values") -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors of these values and of others of the same structures."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine is not None and theirs is not None:
                yield mine, theirs

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, entry.name) for entry in fields(self)]


class UnitValues:
    """Scales by hooks what the units of a model give, and writes the same into its weights on demand.

    What a head or a channel gives is scaled where the output projection reads it, a hidden dimension wherever something
    is written to it, and a layer in all that it writes. Every norm over such units runs over those alone that are not
    closed, with zeros for the others; a closed layer is left out. So the model computes what it will once the values
    are folded into its weights and the closed units are cut out. A head that is the embedding takes that scale too,
    since it is folded into both.

    Args:
        anatomy: of the model.
        values: what the units count for at first. Later ones are for the same structures.
    """

    def __init__(self, anatomy: Anatomy, values: Values) -> None:
        self._anatomy = anatomy
        self._heads_per_group = anatomy.shape.heads_per_group
        self._head_dim = anatomy.shape.head_dim
        self._kept: dict[tuple[Axis, int], Tensor] = {}  # norms over fewer than all: which dimensions
        self._closed: frozenset[int] = frozenset()  # layers
        self._handles: list[Handle] = []
        self._tied = _tied_head(anatomy)
        self._normed = {(site.axes[0], site.layer or 0) for site in anatomy.sites() if site.is_norm}
        self.set(values)
        for site in anatomy.sites():
            self._attach(site)
        for writer in anatomy.writers():
            if values.layers is not None or values.hidden is not None:
                self._handles.append(change_output(writer.module, _scaled_by(partial(self._of_writer, writer))))
        if values.layers is not None:
            self._handles += [Bypass(layer, i, self._is_closed(i)) for i, layer in enumerate(anatomy.layers)]

    def set(self, values: Values, *, known: bool = True) -> None:
        """Let the units count for as much from now on.

        Args:
            values: what they count for.
            known: whether the host reads them, once, to leave closed layers out and norms alone that keep everything.
                Else it waits for nothing: all layers run, and every norm over masked units runs over those that are
                open, however many these are. The model computes the same.
        """
        self.values = values
        with torch.no_grad():
            layers = values.layers.tolist() if known and values.layers is not None else []
            self._closed = frozenset(index for index, value in enumerate(layers) if value == 0)
            self._kept = {}
            for axes in (HIDDEN, HEADS, KV_GROUPS):
                self._note_kept(axes, known)

    def remove(self) -> None:
        """Take every hook off the model."""
        remove_all(self._handles)

    @torch.no_grad()
    def fold(self, edited: Edited = lambda parameter: nullcontext(parameter.detach())) -> None:
        """Write the values into the weights, so that the model computes the same without hooks, and after the cut.

        Args:
            edited: gives the whole of a parameter, to be changed in place.
        """
        for site in self._anatomy.sites():
            if site.reads(HEADS) or site.reads(CHANNELS):
                scale = self._of_reader(site)
                if scale is not None:
                    _scale(edited, site.module, "weight", scale, inputs=True)
            elif site.layer is None and site.writes_hidden and self.values.hidden is not None:
                inputs = isinstance(site.module, nn.Embedding)
                _scale(edited, site.module, "weight", self.values.hidden, inputs=inputs)
        for writer in self._anatomy.writers():
            scale = self._of_writer(writer)
            if scale is not None:
                fold_writer(edited, writer, scale)

    def _attach(self, site: Site) -> None:
        values, module = self.values, site.module
        if (site.reads(HEADS) and values.heads is not None) or (site.reads(CHANNELS) and values.channels is not None):
            self._handles.append(change_input(module, _scaled_by(partial(self._of_reader, site))))
        if values.hidden is not None and site.layer is None:
            if site.writes_hidden:
                self._handles.append(change_output(module, _scaled_by(lambda: self.values.hidden)))
            if module is self._tied:
                self._handles.append(change_input(module, _scaled_by(lambda: self.values.hidden)))
        if site.is_norm and (values.hidden if site.axes[0] == HIDDEN else values.heads) is not None:
            self._handles.append(ReplacedForward(module, self._norm(site)))

    def _of_reader(self, site: Site) -> Tensor | None:
        """What each of the inputs [m] of an output projection counts for."""
        assert site.layer is not None
        if site.reads(CHANNELS):
            return None if self.values.channels is None else self.values.channels[site.layer]
        heads = self.values.heads
        return None if heads is None else heads[site.layer].repeat_interleave(self._head_dim)

    def _of_writer(self, writer: Writer) -> Tensor | None:
        """What the output of a writer counts for, [d] or []."""
        layers, hidden = self.values.layers, self.values.hidden
        if layers is None:
            return hidden
        return layers[writer.layer] if hidden is None else hidden * layers[writer.layer]

    def _is_closed(self, layer: int) -> Callable[[], bool]:
        return lambda: layer in self._closed

    def _note_kept(self, axis: Axis, known: bool) -> None:
        """Record for the norms over an axis which dimensions stay; read by the host only if some do not."""
        values = self.values.hidden if axis == HIDDEN else self.values.heads
        places = [layer for normed, layer in self._normed if normed == axis]
        if values is None or not places:
            return
        is_open = (values > 0).reshape(-1, values.shape[-1])
        if axis == KV_GROUPS:
            is_open = torch.unflatten(is_open, -1, (-1, self._heads_per_group)).any(-1)
        # Where nothing is open, nothing comes of it, whatever the norm gives.
        narrowed = (is_open.any(-1) & ~is_open.all(-1)).tolist() if known else [True] * len(is_open)
        rows = 1 if axis == HIDDEN else self._head_dim
        kept = is_open.to(values.dtype).repeat_interleave(rows, dim=-1)
        for layer in places:
            row = 0 if axis == HIDDEN else layer
            if narrowed[row]:
                self._kept[axis, layer] = kept[row]

    def _norm(self, site: Site) -> Callable[..., Tensor]:
        axis = site.axes[0]
        assert axis is not None

        def forward(stock_forward: Callable[..., Tensor], values: Tensor) -> Tensor:
            kept = self._kept.get((axis, site.layer or 0))
            return stock_forward(values) if kept is None else norm_over(site.module, values, kept)

        return forward


def fold_writer(edited: Edited, writer: Writer, scale: Tensor) -> None:
    """Write into a writer's weights what its output is multiplied by.

    Args:
        edited: gives the whole of a parameter, to be changed in place.
        writer: what writes to the residual stream.
        scale: [d] or [].
    """
    for name in writer.names:
        _scale(edited, writer.module, name, scale, offset=writer.offset)


def _scaled_by(scale_now: Callable[[], Tensor | None]) -> Callable[[Tensor], Tensor]:
    """Multiplies an activation [..., n] by the current value of a scale, [n] or []."""

    def change(activation: Tensor) -> Tensor:
        scale = scale_now()
        assert scale is not None
        return scaled(activation, scale)

    return change


def scaled(activation: Tensor, scale: Tensor) -> Tensor:
    """`activation` [..., n] times `scale`, [n] or []; where this is 0, its gradient is taken to be 0.

    So it is for hard-concrete values, which are clipped there. In return the product alone is kept for the backward
    pass: where a projection reads it, that keeps it anyway.
    """
    if scale.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Scaled.apply(activation, scale))  # type: ignore[no-untyped-call]
    return activation * scale.to(activation.dtype)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, scale: Tensor) -> Tensor:
        product = activation * scale.to(activation.dtype)
        ctx.save_for_backward(product, scale)
        return product

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor]:
        product, scale = ctx.saved_tensors
        (slope,) = slopes
        precision = torch.promote_types(product.dtype, scale.dtype)
        dimensions = tuple(range(slope.ndim - scale.ndim))
        sums = (slope * product).sum(dimensions, dtype=precision)
        of_scale = torch.where(scale > 0, sums / scale, 0).to(scale.dtype)
        return (slope * scale.to(slope.dtype) if ctx.needs_input_grad[0] else None), of_scale


def _tied_head(anatomy: Anatomy) -> nn.Module | None:
    """The output head, where its weight is the embedding's and spans the hidden dimensions."""
    stem = [site for site in anatomy.sites() if site.layer is None]
    embeddings = [site.module.weight for site in stem if isinstance(site.module, nn.Embedding)]
    heads = [site.module for site in stem if site.reads(HIDDEN) and not isinstance(site.module, nn.Embedding)]
    return next((head for head in heads if any(head.weight is weight for weight in embeddings)), None)


def _scale(
    edited: Edited, module: nn.Module, name: str, scale: Tensor, *, inputs: bool = False, offset: float = 0.0
) -> None:
    """Multiply a parameter, plus `offset`, by `scale`: [], or [n] along the module's outputs, or its inputs."""
    parameter = getattr(module, name, None)
    if parameter is None:
        return
    with edited(parameter) as values:
        if scale.ndim and values.ndim > 1 and inputs == isinstance(module, Conv1D):
            scale = scale.unsqueeze(1)
        precise = values.to(torch.promote_types(values.dtype, scale.dtype))
        values.copy_((precise + offset) * scale - offset)
