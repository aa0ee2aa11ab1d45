"""The stages of a run: the order in which data flows through the parts, and the names of a run's phases."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

from lightning.pytorch.callbacks import Callback, Checkpoint, ModelPruning

Phase = Literal["select", "transfer", "recover", "train"]
Status = dict[str, int | float | str]


class Stage(IntEnum):
    """The order in which data flows through the parts."""

    SELECT = 0
    REGULARIZE = 1
    COMPENSATE = 2
    CUT = 3
    RECOVER = 4


def parts_last(callbacks: Sequence[Callback], parts: Sequence[Callback]) -> list[Callback]:
    """The callbacks in calling order: other callbacks as they were, the parts, and last those that save checkpoints.

    First of the strangers is Lightning's ModelPruning, which makes its masks permanent when training ends: whoever
    exports the model then has to find plain weights.
    """
    savers = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    masking = [callback for callback in callbacks if isinstance(callback, ModelPruning)]
    placed = [*savers, *masking, *parts]
    others = [callback for callback in callbacks if not any(callback is one for one in placed)]
    return [*masking, *others, *parts, *savers]
