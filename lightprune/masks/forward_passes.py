"""Watching the forward passes of a model from outside, whatever module calls them, and however.

A module may call the causal LM, or its decoder and head for a loss of its own: what every pass goes through, and what
is watched, is `Anatomy.decoder`.

Shapes: B sequences, T tokens, d hidden dimensions.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
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

        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self.mask = attention_mask_of(call_inputs(module, args, kwargs))

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


def attention_mask_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The attention mask [B, T] among the inputs of a call; None if there is none of this shape."""
    mask = inputs.get("attention_mask")
    return mask if mask is not None and mask.ndim == 2 else None


def on_output(layer: nn.Module, use: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `use(X_in, X_out)`, both [B, T, d], after each of the layer's forward passes.

    What is seen is the layer's own output, before any gate: the hook goes in front of those already there.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        use(inputs[0], output)

    return layer.register_forward_hook(hook, prepend=True)


def call_inputs(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Tensor]:
    """The tensors that a call of `module` was given, by name, without gradients; a KV cache is left out."""
    if args:  # families differ in what comes second
        _, *parameters = inspect.signature(type(module).forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    return {name: value.detach() for name, value in kwargs.items() if isinstance(value, Tensor)}


def logits_of(output: object) -> object:
    """The logits in what an LM gives: by name, or with `return_dict=False` first, or behind the loss."""
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        return next((value for value in output[:2] if isinstance(value, Tensor) and value.ndim == 3), None)
    return getattr(output, "logits", None)


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
