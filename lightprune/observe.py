"""Watching the causal LM's forward passes from outside, whatever module calls them.

Shapes: B sequences, T tokens, d hidden dimensions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class TokenMask:
    """The attention mask [B, T] of the current forward pass, so that padding weighs nothing in a mean."""

    mask: Tensor | None = None

    def watch(self, decoder: nn.Module) -> RemovableHandle:
        """Follow the calls of `Anatomy.decoder` until the handle is removed."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.mask = attention_mask_of(args, kwargs)

        return decoder.register_forward_pre_hook(hook, with_kwargs=True)

    def total(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of per-token `values` [B, T] over the tokens that are not padding, and how many these are.

        Tokens whose value is not finite (float16 overflows) are left out.
        """
        counted = values.isfinite()
        if self.mask is not None and self.mask.shape == values.shape:
            counted = counted & self.mask.to(values.device, torch.bool)
        return torch.where(counted, values, 0).sum(), counted.sum()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of per-token `values` [B, T] over the tokens that are not padding; 0 where all are."""
        total, count = self.total(values)
        return total / count.clamp(min=1)


def attention_mask_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The attention mask [B, T] that a call of a causal LM was given, by position or by name; None if it is no such."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def on_output(layer: nn.Module, use: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `use(X_in, X_out)`, both [B, T, d], after each of the layer's forward passes.

    What is seen is the layer's own output, before any gate: the hook goes in front of those already there.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        use(inputs[0], output)

    return layer.register_forward_hook(hook, prepend=True)


def call_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a call of a causal LM was given, by name, without gradients; a KV cache is left out."""
    named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
    return {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; afterwards every submodule is in the mode that it was in."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training
