"""Steps of the optimizers that parts have for parameters of their own, without waiting for the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that an optimizer's parameters have now."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def all_finite(gradients: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
    """Whether no gradient has overflowed, and `present` holds: a bool tensor [], read by nobody here."""
    holds = [] if present is None else [present]
    return torch.stack([*holds, *(gradient.isfinite().all() for gradient in gradients)]).all()


@torch.no_grad()
def step_where(optimizer: Optimizer, holds: Tensor) -> None:
    """Step an optimizer of few parameters, and take it back, state and all, where the bool `holds` [] does not hold.

    The host need not know which, so it does not wait for the device. State that lies elsewhere is not taken back: a
    count of steps on the host, where Adam is not `capturable`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = {parameter: parameter.clone() for parameter in parameters}
    state = {p: {name: _copied(value) for name, value in optimizer.state[p].items()} for p in parameters}
    optimizer.step()
    for parameter in parameters:
        parameter.copy_(torch.where(holds, parameter, before[parameter]))
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.device == holds.device:
                old = state[parameter].get(name, torch.zeros_like(value))
                value.copy_(torch.where(holds, value, old))


def _copied(value: object) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def adam_on(device: torch.device, groups: Any, **settings: Any) -> torch.optim.Adam:
    """Adam for a part's own parameters: on a GPU its count of steps lies there too, so that nothing waits for it."""
    return torch.optim.Adam(groups, capturable=device.type == "cuda", **settings)


def average_gradients(optimizer: Optimizer, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace the gradients of an optimizer's parameters by their means over all ranks, in one reduction.

    A rank that has none counts as zeros. Returns whether any rank has one: bool [].
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    present = any(parameter.grad is not None for parameter in parameters)
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.float().flatten() for piece in pieces] + [pieces[0].new_tensor([present]).float()])
    flat = mean(flat)
    offset = 0
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = flat[offset : offset + piece.numel()].view_as(piece).to(piece.dtype)
        offset += piece.numel()
    return flat[-1] > 0
