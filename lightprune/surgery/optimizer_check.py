"""Which optimizers go through a cut: in width those whose state can be sliced as the parameters are."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightprune.errors import ConfigError

# Known to keep tensors of the parameter's own shape and numbers, and nothing else.
_KNOWN: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD)
# The same of deepspeed, by name, since it need not be installed. A copy of one would share what lies in C++.
_KNOWN_IN_DEEPSPEED = ("DeepSpeedCPUAdam", "FusedAdam")

# The shape that a parameter for trying out has in each number of dimensions: no two lengths are the same, and they are
# large enough for optimizers that factor, or pack into blocks, what is large only.
_SHAPES: Mapping[int, tuple[int, ...]] = {0: (), 1: (8192,), 2: (256, 384)}


def check_optimizer(optimizer: Optimizer, *, flat: torch.device | None = None) -> None:
    """Refuse an optimizer whose state cannot be sliced with the parameters.

    The state of a parameter may have tensors of the parameter's own shape, and numbers. Where there is no state yet,
    a copy of the optimizer steps a parameter of no meaning once, with the options of each group, and shows its state.

    Args:
        optimizer: the user's own.
        flat: the device of flat tensors that it steps in place of parameters, as under ZeRO, where its groups may be
            empty between steps.

    Raises:
        ConfigError: the state is another one, or the copy cannot step.
    """
    if type(optimizer) in _KNOWN or type(optimizer).__name__ in _KNOWN_IN_DEEPSPEED:
        return
    name = type(optimizer).__name__
    inner = [type(value).__name__ for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    if inner:
        raise _refusal(name, f"it wraps another optimizer, {inner[0]}")
    check_groups_hold_all(optimizer)
    for group in optimizer.param_groups:
        known = [
            (parameter, optimizer.state[parameter]) for parameter in group["params"] if parameter in optimizer.state
        ]
        try:
            # On a resume, and in optimizers that begin with one, the state is there.
            states = known or list(_tried_out(optimizer, group, flat))
        except Exception as error:  # whatever an optimizer of somebody else's raises
            reason = f"{type(error).__name__}: {error}".strip().split("\n")[0].rstrip(".")
            raise _refusal(name, f"a copy of it cannot step to show its state ({reason})") from error
        for parameter, state in states:
            for key, value in state.items():
                if not _can_be_sliced(value, parameter):
                    raise _refusal(
                        name, f"its state {key!r} is {_in_words(value)} for a parameter {list(parameter.shape)}"
                    )


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"lightprune cannot carry the state of {name} through a cut in width, since {reason}: choose another in the "
        "module's `optimizer`, whose state has the shape of the parameters, such as AdamW or SGD, or cut layers only."
    )


def check_groups_hold_all(optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps its parameters in a second place, of which no cut knows, as LBFGS does.

    Raises:
        ConfigError: it names that place.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in vars(optimizer).items():
        if key not in ("param_groups", "state") and any(id(item) in own for item in _items(value)):
            raise ConfigError(
                f"lightprune cannot take parameters out of {type(optimizer).__name__}, which keeps parameters outside "
                f"of its groups, in `{key}`: choose another in the module's `optimizer`, such as AdamW or SGD."
            )


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple, set)) else ()


def _can_be_sliced(value: object, parameter: Tensor) -> bool:
    if not torch.is_tensor(value):
        return value is None or isinstance(value, (bool, int, float, str))
    # A subclass packs its numbers in a way of its own.
    plain = type(value) in (Tensor, nn.Parameter)
    return plain and (value.ndim == 0 or value.shape == parameter.shape or value.numel() == 1)


def _in_words(value: object) -> str:
    if torch.is_tensor(value):
        return f"a {type(value).__name__} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _tried_out(
    optimizer: Optimizer, group: dict[str, Any], flat: torch.device | None
) -> Iterator[tuple[Tensor, Mapping[str, object]]]:
    """The state of a parameter of each number of dimensions in a group, after one step of a copy of the optimizer."""
    models: dict[int, Tensor] = {parameter.ndim: parameter for parameter in group["params"]}
    if not models and flat is not None:
        models = {1: torch.zeros(1, device=flat)}
    for model in models.values():
        shape = _SHAPES.get(model.ndim, (*(range(2, model.ndim)), *_SHAPES[2]))
        stand_in = nn.Parameter(torch.ones(shape, dtype=model.dtype, device=model.device))
        stand_in.grad = torch.full_like(stand_in, 1e-3)
        trial = _copy_for(optimizer, {**group, "params": [stand_in]})
        with isolate_rng():
            # The class's own: Lightning and schedulers may have put another `step` on the instance.
            type(optimizer).step(trial)
        yield stand_in, trial.state[stand_in]


def _copy_for(optimizer: Optimizer, group: dict[str, object]) -> Optimizer:
    """An optimizer of the same class, with the same attributes, of another group, and without state and hooks."""
    trial: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            vars(trial)[name] = type(value)()
        elif name not in ("step", "zero_grad", "state", "param_groups"):
            vars(trial)[name] = value.clone() if torch.is_tensor(value) else copy.copy(value)
    trial.state = defaultdict(dict)
    trial.param_groups = [{key: value if key == "params" else copy.deepcopy(value) for key, value in group.items()}]
    train = getattr(trial, "train", None)
    if callable(train):  # schedule-free optimizers step only in this mode
        train()
    return trial
