"""Watching and changing modules of one layer, in single passes of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightprune.compensation.projections import Projection
from lightprune.masks.gates import Handle, remove_all


class Enough(Exception):
    """All that was to be observed has been."""


class Observed:
    """The inputs and outputs of modules of one layer, by the modules' names, in the pass inside the context.

    Args:
        projections: the modules.
        stop: whether to end the pass, by `Enough`, once all of them have run.
    """

    def __init__(self, projections: Sequence[Projection], *, stop: bool = False) -> None:
        self._projections = projections
        self._stop = stop

    def __enter__(self) -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[path] = inputs[0], output
            if self._stop and len(seen) == len(self._projections):
                raise Enough

        self._handles: list[Handle] = [p.module.register_forward_hook(partial(note, p.path)) for p in self._projections]
        return seen

    def __exit__(self, *error: object) -> None:
        remove_all(self._handles)


class Pending:
    """A change of a projection that is not written yet: it acts in passes of the smaller model."""

    def __init__(self, projection: Projection, change: Tensor) -> None:
        self.on = False

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.on:
                return None
            if not projection.is_linear:
                return output * (1 + change).to(output.dtype)
            values: Tensor = inputs[0].float()
            added = values @ change[: values.shape[-1]]
            if len(change) > values.shape[-1]:
                added = added + change[-1]
            return output + added.to(output.dtype)

        self._handle = projection.module.register_forward_hook(hook)

    def remove(self) -> None:
        """Let the module compute what its weights say."""
        self._handle.remove()
