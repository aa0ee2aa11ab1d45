"""Surgery on optimizers: removed parameters leave, and everything that belongs to the others stays."""

from collections.abc import Collection
from itertools import compress

import torch
from torch import nn
from torch.optim import Optimizer

from lightprune.integrations.torch_modules import inner_schedulers
from lightprune.surgery.model import Rows, sliced

# What PyTorch's schedulers keep one entry of for every parameter group.
_PER_GROUP_LISTS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


def replace_parameter(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, rows: Rows) -> None:
    """Replace `old` by `new`, its `rows` that stay, and keep the moments of these rows."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            name: sliced(value, rows) if torch.is_tensor(value) and value.shape == old.shape else value
            for name, value in state.items()
        }


def remove_parameters(optimizer: Optimizer, schedulers: Collection[object], removed: Collection[nn.Parameter]) -> None:
    """Remove parameters from an optimizer, in place, with their moments.

    The parameters that stay keep their moments, step counts, group options and order; groups that lose their last
    parameter disappear, from the optimizer and from the `schedulers` that drive it, so that the result is what a
    fresh `configure_optimizers` on the cut model would make, with its state carried over.
    """
    gone = {id(parameter) for parameter in removed}
    surviving = []
    for index, group in enumerate(optimizer.param_groups):
        had_parameters = bool(group["params"])
        stays = [id(parameter) not in gone for parameter in group["params"]]
        for entries in ("params", "param_names"):  # names are there where the optimizer was made with them
            if entries in group:
                group[entries] = list(compress(group[entries], stays))
        if group["params"] or not had_parameters:
            surviving.append(index)
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    _drop_groups(optimizer, schedulers, surviving)


def drop_empty_groups(optimizer: Optimizer, schedulers: Collection[object]) -> None:
    """Take groups without a parameter that trains out of an optimizer and the `schedulers` that drive it."""
    trains = [any(parameter.requires_grad for parameter in group["params"]) for group in optimizer.param_groups]
    _drop_groups(optimizer, schedulers, [index for index, any_trains in enumerate(trains) if any_trains])


def _drop_groups(optimizer: Optimizer, schedulers: Collection[object], surviving: list[int]) -> None:
    num_groups = len(optimizer.param_groups)
    optimizer.param_groups[:] = [optimizer.param_groups[index] for index in surviving]
    for scheduler in schedulers:
        _keep_groups(scheduler, surviving, num_groups)


def _keep_groups(scheduler: object, surviving: list[int], num_groups: int) -> None:
    for nested in inner_schedulers(scheduler):
        _keep_groups(nested, surviving, num_groups)
    for name in _PER_GROUP_LISTS:
        entries = getattr(scheduler, name, None)
        if isinstance(entries, list) and len(entries) == num_groups:
            setattr(scheduler, name, [entries[index] for index in surviving])
