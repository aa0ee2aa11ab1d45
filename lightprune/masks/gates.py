"""Gates on decoder layers: hooks that scale what a layer contributes, and bypasses that leave a layer out.

Shapes: B sequences, T tokens, d hidden dimensions, L layers. Hidden states are [B, T, d].
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

Placement = Literal["residual", "output"]


class Handle(Protocol):
    """Something attached to a model, to be taken off again."""

    def remove(self) -> None:
        """Take it off."""


def remove_all(handles: list[Handle]) -> None:
    """Take everything off, the latest first, and leave the list empty."""
    while handles:
        handles.pop().remove()


def gated(hidden_in: Tensor, hidden_out: Tensor, gate: Tensor, placement: Placement) -> Tensor:
    """A layer's output under a scalar gate; exactly `hidden_out`, gradients included, where the gate is 1.

    Args:
        hidden_in: the layer's input X_in [B, T, d].
        hidden_out: the layer's output X_out [B, T, d], residual included.
        gate: the scalar s.
        placement: "output" scales the whole output, s * X_out (TRSP, figure of stage 1); "residual" scales the
            residual branch, X_in + s * (X_out - X_in), so that s = 0 is the layer left out.
    """
    gate = gate.to(hidden_out.dtype)
    if placement == "output":
        return hidden_out * gate
    return torch.lerp(hidden_in.to(hidden_out.dtype), hidden_out, gate)


def attach_gate(layer: nn.Module, gates: Tensor, index: int, placement: Placement) -> RemovableHandle:
    """Gate `layer` by `gates[index]` until the handle is removed; `gates` [L] may be learned or scheduled."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return gated(inputs[0], output, gates[index], placement)

    return layer.register_forward_hook(hook)


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a module take `change(x)` for its first input x, until the handle is removed."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    return module.register_forward_pre_hook(hook)


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a module give `change(y)` for its output y, until the handle is removed."""

    def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
        return change(output)

    return module.register_forward_hook(hook)


class ReplacedForward:
    """Lets a module run `forward(stock_forward, *args)` in place of its own, until `remove` is called.

    The module's own may have been replaced already, by another part or by Liger and the like; they may be removed in
    any order.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module = module
        self._forward = forward
        self._before = vars(module).get("forward")
        self._stock_forward = module.forward
        self._removed = False
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._removed:  # and one that came later is still there
            return cast(Tensor, self._stock_forward(*args, **kwargs))
        return self._forward(self._stock_forward, *args, **kwargs)

    def remove(self) -> None:
        """Let the module run as it did."""
        self._removed = True
        forward = vars(self._module).get("forward")
        while isinstance(forward, ReplacedForward) and forward._removed:
            forward = forward._before
        if forward is None:  # the class's own
            vars(self._module).pop("forward", None)
        else:
            self._module.forward = forward


class Bypass(ReplacedForward):
    """Leaves a layer out of the forward pass: hidden states go by it untouched, until `remove` is called.

    With a KV cache, the first layer, and the first of each kind of attention, are run and their output discarded: that
    is where the cache counts its tokens and the masks are measured, and every later position would be wrong without it.

    Args:
        layer: the layer.
        index: its index.
        when: asked at each forward pass whether to leave it out; always, if not given.
    """

    def __init__(self, layer: nn.Module, index: int, when: Callable[[], bool] = lambda: True) -> None:
        def forward(stock_forward: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not when():
                return stock_forward(hidden_states, *args, **kwargs)
            caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
            if any(_is_measured(cache, index) for cache in caches):
                stock_forward(hidden_states, *args, **kwargs)
            return hidden_states

        super().__init__(layer, forward)


def _is_measured(cache: Cache, index: int) -> bool:
    """Whether transformers reads the lengths of a whole kind of layers (full, sliding) off layer `index`."""
    kinds = cache.is_sliding
    return index == 0 or (index < len(kinds) and kinds.index(kinds[index]) == index)
