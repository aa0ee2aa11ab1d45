"""Masks that make a whole model compute what the cut model will: units scaled by alpha, norms over what is kept.

Shapes: L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, Run
from lightprune.anatomy.base import Site
from lightprune.integrations.torch_modules import with_parameters
from lightprune.masks.gates import Bypass, Handle, change_input, change_output, remove_all
from lightprune.plan import PruningPlan
from lightprune.surgery import kept_rows


class UnitMasks:
    """Scales the contribution of every unit that a plan removes by alpha, from 1 (the stock model) to 0 (the cut one).

    What a query head or an MLP channel gives is scaled where the attention's or the MLP's output projection reads it; a
    key-value group goes with its query heads. A hidden dimension is scaled wherever something is written to it, and
    every norm over hidden dimensions gives alpha times what it gives now, plus (1 - alpha) times what it gives on the
    kept dimensions alone, with zeros elsewhere: at 0 the model's logits are those of the cut model, exactly. Layers
    that the plan removes are left to gates (`lightprune.masks.gates`): nothing is done about their own heads and
    channels.

    Args:
        anatomy: of the uncut model.
        plan: what stays.

    Attributes:
        alpha: float32 [L], for the heads and channels of each layer.
        alpha_hidden: float32 [], for the hidden dimensions.
    """

    def __init__(self, anatomy: Anatomy, plan: PruningPlan) -> None:
        device = anatomy.lm.device
        self.alpha = torch.ones(plan.source.layers, device=device)
        self.alpha_hidden = torch.ones((), device=device)
        self._one = torch.ones((), device=device)
        self._plan = plan
        self._handles: list[Handle] = []
        for site in anatomy.sites():
            self._attach(site)

    def remove(self) -> None:
        """Take every hook off the model."""
        remove_all(self._handles)

    def _attach(self, site: Site) -> None:
        layer, stays = site.layer, site.layer not in self._plan.dropped_layers
        for axis in (HEADS, CHANNELS):
            if layer is not None and stays and site.reads(axis) and self._plan.removed(axis[0].unit, layer):
                self._handles.append(change_input(site.module, self._scaled(axis[0], layer, self.alpha[layer])))
        if site.writes_hidden and self._plan.removed("hidden", 0):
            self._handles.append(change_output(site.module, self._scaled(HIDDEN[0], 0, self.alpha_hidden)))
        if site.is_norm and (stays or site.axes[0] == HIDDEN):
            (rows_kept,) = kept_rows(site.axes, self._plan, layer)
            if rows_kept is not None:
                alpha = self.alpha_hidden if site.axes[0] == HIDDEN else self.alpha[layer or 0]
                self._handles.append(_blend_norm(site.module, rows_kept.to(alpha.device), alpha))

    def _scaled(self, run: Run, layer: int, alpha: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplies the rows [..., n] of the units that go by alpha, as it is by then, and the others by 1."""
        removed = torch.zeros(self._plan.source.count(run.unit), dtype=torch.bool)
        removed[self._plan.removed(run.unit, layer)] = True
        removed = removed.repeat_interleave(run.rows(self._plan.source)).to(alpha.device)
        return lambda values: values * torch.where(removed, alpha, self._one).to(values.dtype)


def mask_out(anatomy: Anatomy, plan: PruningPlan) -> list[Handle]:
    """Let the uncut model compute exactly what the model cut by `plan` would, until the handles are removed."""
    masks = UnitMasks(anatomy, plan)
    masks.alpha.zero_()
    masks.alpha_hidden.zero_()
    return [masks, *(Bypass(anatomy.layers[index], index) for index in plan.dropped_layers)]


@contextmanager
def masked(anatomy: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """Let the uncut model compute, inside the context, exactly what the model cut by `plan` would."""
    handles = mask_out(anatomy, plan)
    try:
        yield
    finally:
        remove_all(handles)


def _blend_norm(norm: nn.Module, rows: Tensor, alpha: Tensor) -> RemovableHandle:
    """Let a norm give alpha * (its own output) + (1 - alpha) * (its output on the kept `rows` alone, 0 elsewhere)."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # The class's own forward: the instance's may be another part's, for all of its dimensions.
        gathered = type(norm).forward(_narrowed(norm, rows), inputs[0].index_select(-1, rows))
        scattered = torch.zeros_like(output).index_copy(-1, rows, gathered.to(output.dtype))
        return torch.lerp(scattered, output, alpha.to(output.dtype))

    # In front of the hooks of ZeRO-3, which leave nothing of the norm's weights behind.
    return norm.register_forward_hook(hook, prepend=True)


def _narrowed(norm: nn.Module, rows: Tensor) -> nn.Module:
    """The same norm over fewer dimensions; gradients reach the parameters of the whole one."""
    of_norm = dict(norm.named_parameters(recurse=False))
    small = with_parameters(norm, {name: p.index_select(0, rows) for name, p in of_norm.items()})
    if isinstance(norm, nn.LayerNorm):
        small.__dict__["normalized_shape"] = (len(rows),)
    return small
