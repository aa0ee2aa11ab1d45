"""Running a decoder's layers one at a time, each with the inputs that its model would give it.

Shapes: B sequences, T tokens, d hidden dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightprune.anatomy import Anatomy
from lightprune.masks.gates import ReplacedForward, remove_all


@dataclass
class Replay:
    """The layers of a decoder for one batch: rotary embeddings, masks and the like are those of this batch.

    Attributes:
        start: what the first layer is given, [B, T, d].
        calls: for each layer, what it is given beside the hidden states.
    """

    start: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def of(cls, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> "Replay":
        """The layers for a batch that the decoder is called with; no layer is run."""
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        states: list[Tensor] = []

        def note(index: int, stock: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls[index] = args, kwargs
            states.append(hidden)
            return hidden

        replaced = [ReplacedForward(layer, partial(note, index)) for index, layer in enumerate(anatomy.layers)]
        try:
            anatomy.decoder(**inputs, use_cache=False)
        finally:
            remove_all([*replaced])
        return cls(states[0].detach(), [calls[index] for index in range(anatomy.num_layers)])

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What layer `index` makes of hidden states [B, T, d]."""
        args, kwargs = self.calls[index]
        output: Tensor = layer(hidden, *args, **kwargs)
        return output
