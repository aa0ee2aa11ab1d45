"""Which modules of a layer are refitted when a plan is executed, and in which order."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, Axis, of_attention
from lightprune.anatomy.base import module_at
from lightprune.plan import PruningPlan


@dataclass(frozen=True)
class Projection:
    """A module whose parameters are refitted.

    Attributes:
        module: a linear map, or a norm.
        path: its name in its layer.
        towards_stream: whether it is refitted for what the residual stream lacks, else for its own dense output.
        ends_layer: whether nothing of the layer writes to the residual stream behind it.
    """

    module: nn.Module
    path: str
    towards_stream: bool
    ends_layer: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear map; else it is a norm, which has one weight for each output."""
        return isinstance(self.module, (nn.Linear, Conv1D))


def projections_of(
    anatomy: Anatomy, plan: PruningPlan, index: int, *, lacking: bool, border: bool, everywhere: bool
) -> list[list[Projection]]:
    """What is refitted in layer `index`, in the order of the data flow; what stands together does not depend on itself.

    A writer (attention's output projection, the MLP's down projection, or the norm behind one) is refitted where the
    layer loses units, where the residual stream lacks something, and where a removed run of layers follows. Where
    hidden dimensions go, the readers in front of it are refitted too, towards their own dense outputs. A writer that is
    a norm scales what it is given, so the projection in front of it is refitted first if its units go.

    Args:
        anatomy: of the uncut model.
        plan: what stays.
        index: a layer that stays.
        lacking: whether the residual stream lacks something in front of this layer.
        border: whether a removed run of layers follows.
        everywhere: whether a writer is refitted for a lack alone, also where its own layer loses nothing.
    """
    layer, family = anatomy.layers[index], anatomy.family
    loses_hidden = bool(plan.removed("hidden", 0))
    steps: list[list[Projection]] = []
    writers = {path: module for path in family.writers if (module := module_at(layer, path)) is not None}
    for number, (path, module) in enumerate(writers.items()):
        axis = CHANNELS if number else HEADS
        if loses_hidden:
            steps.append(list(_readers(anatomy, layer, axis)))
        loses_units = any(plan.removed(run.unit, index) for run in axis)
        inner = _inner(anatomy, layer, axis)
        if loses_units and inner is not None and inner.module is not module:
            steps.append([inner])
        lacking = lacking or loses_units
        writer = Projection(module, path, towards_stream=True, ends_layer=path == list(writers)[-1])
        has_weight = any(name == "weight" for name, _ in module.named_parameters(recurse=False))
        needed = loses_units or loses_hidden or border or (lacking and everywhere)
        if needed and (writer.is_linear or has_weight):
            steps.append([writer])
    return [step for step in steps if step]


def _readers(anatomy: Anatomy, layer: nn.Module, axis: Axis) -> Iterator[Projection]:
    """The projections that read the residual stream for the heads, or for the channels."""
    for path, axes in anatomy.family.weights.items():
        module = module_at(layer, path)
        if module is None or len(axes) != 2 or axes[1] != HIDDEN or axes[0] is None:
            continue
        if of_attention(axes[0]) == (axis == HEADS):
            yield Projection(module, path, towards_stream=False)


def _inner(anatomy: Anatomy, layer: nn.Module, axis: Axis) -> Projection | None:
    """The projection that takes what heads, or channels, give."""
    for path, axes in anatomy.family.weights.items():
        module = module_at(layer, path)
        if module is not None and len(axes) == 2 and axes[1] == axis:
            return Projection(module, path, towards_stream=False)
    return None
