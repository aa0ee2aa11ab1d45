"""Messages between the ranks of a run, by `torch.distributed` itself: Lightning's `Strategy.reduce` adds a barrier."""

import torch
from torch import Tensor
from torch.distributed import ReduceOp


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, a new tensor; every rank must ask. The tensor lies where the ranks talk."""
    return _reduced(tensor, ReduceOp.SUM)


def largest_of_ranks(tensor: Tensor) -> Tensor:
    """The largest value over all ranks, element by element, a new tensor; every rank must ask."""
    return _reduced(tensor, ReduceOp.MAX)


def _reduced(tensor: Tensor, how: ReduceOp.RedOpType) -> Tensor:
    result = tensor.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(result, how)
    return result
