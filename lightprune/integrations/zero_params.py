"""Parameters that ZeRO-3 has partitioned: their shapes, and the whole of one at a time.

Such a parameter is empty outside its module's forward and backward passes; every rank keeps an equal part of its
flattened values, padded at the end, in `ds_tensor`. All other parameters are whole as they are.
"""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

Edited = Callable[[nn.Parameter], AbstractContextManager[Tensor]]
"""Gives the whole of a parameter, to be changed in place."""


def is_partitioned(parameter: Tensor) -> bool:
    """Whether each rank keeps a part of the parameter only."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(cast(Any, parameter).ds_shape) if is_partitioned(parameter) else parameter.shape


def parameter_count(module: nn.Module) -> int:
    """How many parameters a module has now; tied ones count once."""
    return sum(whole_shape(parameter).numel() for parameter in module.parameters())


@torch.no_grad()
def gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter, without gradient; it itself if it is whole. Every rank must ask for it."""
    if not is_partitioned(parameter):
        return parameter.detach()
    partitioned: Any = parameter
    part = partitioned.ds_tensor.detach().to(partitioned.device)
    group = partitioned.ds_process_group
    parts: Tensor = part.new_empty(torch.distributed.get_world_size(group) * part.numel())
    torch.distributed.all_gather(list(parts.view(-1, part.numel())), part.contiguous(), group=group)
    return parts[: whole_shape(parameter).numel()].view(whole_shape(parameter))


@contextmanager
def gathered_for_update(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters are whole inside, and what every rank makes of them stays; no optimizer may train them."""
    if not any(map(is_partitioned, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


@contextmanager
def gathered_for_reading(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters are whole inside. Every rank must ask, and none may change them."""
    if not any(map(is_partitioned, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
        yield


@contextmanager
def readable(root: nn.Module) -> Iterator[None]:
    """Inside, each module below `root` has its partitioned parameters whole while it runs. Every rank must run it."""
    handles: list[Any] = []
    for module in root.modules():
        own = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
        if own:
            handles += _gather_around(module, own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather_around(module: nn.Module, parameters: list[nn.Parameter]) -> list[Any]:
    contexts: list[AbstractContextManager[None]] = []

    def enter(module: nn.Module, inputs: tuple[object, ...]) -> None:
        contexts.append(gathered_for_reading(parameters))
        contexts[-1].__enter__()

    def leave(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        contexts.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def partition_like(parameter: nn.Parameter, model: nn.Parameter) -> None:
    """Partition a new parameter, in place, if `model`, which it takes the place of, is."""
    if is_partitioned(model):
        cast(Any, model).convert_to_zero_parameters(param_list=[parameter])


def twin(module: nn.Module, parameters: Mapping[nn.Parameter, nn.Parameter]) -> nn.Module:
    """The same modules with other parameters, buffers on the CPU, and no hooks; tied parameters stay tied."""
    same = copy.copy(module)
    same.__dict__.pop("forward", None)  # one that was replaced is bound to the module
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            same.__dict__[name] = OrderedDict()
    # torch 2.13: `_parameters`, `_buffers` and `_modules` are what a module holds. Without them the copy would be a
    # model that is built anew, on every rank.
    same.__dict__["_parameters"] = {name: p if p is None else parameters[p] for name, p in module._parameters.items()}
    same.__dict__["_buffers"] = {name: b if b is None else b.cpu() for name, b in module._buffers.items()}
    same.__dict__["_modules"] = {name: m if m is None else twin(m, parameters) for name, m in module._modules.items()}
    return same


@contextmanager
def whole_construction() -> Iterator[None]:
    """Modules built inside are whole, in Lightning's `configure_model` too, where ZeRO-3 partitions what it builds."""
    deepspeed = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if deepspeed is None:
        yield
        return
    deepspeed.shutdown_init_context()
    try:
        yield
    finally:
        deepspeed.restore_init_context()
