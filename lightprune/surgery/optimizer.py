"""Surgery on optimizers: parameters that went leave, everything that belongs to the others stays as it is."""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

# What PyTorch's schedulers keep one entry of for every parameter group.
_PER_GROUP_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs")


def remove_parameters(optimizer: Optimizer, schedulers: Collection[Any], removed: Collection[nn.Parameter]) -> None:
    """Take `removed` out of an optimizer, in place, with the moments that belong to them.

    The parameters that stay keep their moments, step counts, group options and order; groups that lose their last
    parameter disappear, from the optimizer and from the `schedulers` that drive it, so that the result is what a
    fresh `configure_optimizers` on the cut model would make, with its state carried over.
    """
    gone = {id(parameter) for parameter in removed}
    surviving = []
    for index, group in enumerate(optimizer.param_groups):
        had_parameters = bool(group["params"])
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        if group["params"] or not had_parameters:
            surviving.append(index)
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    num_groups = len(optimizer.param_groups)
    optimizer.param_groups[:] = [optimizer.param_groups[index] for index in surviving]
    for scheduler in schedulers:
        _keep_groups(scheduler, surviving, num_groups)


def _keep_groups(scheduler: Any, surviving: list[int], num_groups: int) -> None:
    for nested in getattr(scheduler, "_schedulers", ()):
        _keep_groups(nested, surviving, num_groups)
    for name in _PER_GROUP_LISTS:
        entries = getattr(scheduler, name, None)
        if isinstance(entries, list) and len(entries) == num_groups:
            setattr(scheduler, name, [entries[index] for index in surviving])
