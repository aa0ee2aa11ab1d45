"""Invariant 4: through the cut, moments and schedules go on; compared with slicing them by hand in a plain loop."""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

from lightprune import PlanFromFile, PruningPlan, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.surgery import remove_parameters
from tests.families import tiny_lm
from tests.training import Plain, batches, fit

DROP, BEFORE, AFTER = [0, 3], 4, 4
Named = list[tuple[str, nn.Parameter]]


def one_group(named: Named) -> list[dict[str, Any]]:
    return [{"params": [p for _, p in named]}]


def decay_groups(named: Named) -> list[dict[str, Any]]:
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def layer_groups(named: Named) -> list[dict[str, Any]]:
    """A group for every layer, with a rate of its own, and one for the rest."""
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named:
        match = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(int(match[1]) if match else -1, []).append(parameter)
    return [{"params": params, "lr": 1e-3 * 1.3**index} for index, (_, params) in enumerate(sorted(groups.items()))]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=2e-3),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=2e-3, amsgrad=True, foreach=True),
    "adam fused": lambda groups: torch.optim.Adam(groups, lr=2e-3, fused=True),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=2e-3, momentum=0.9, nesterov=True),
}


def rates(optimizer: Optimizer, factor: float) -> list[float]:
    return [factor * group["lr"] for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, [lambda s, i=i: 1 / (1 + s + i) for i in range(len(o.param_groups))]),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: OneCycleLR(o, max_lr=rates(o, 5), total_steps=12),
    "cyclic": lambda o: CyclicLR(o, base_lr=rates(o, 1), max_lr=rates(o, 5), step_size_up=3, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 9)], [3]),
    "sequential across the cut": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=6), ExponentialLR(o, 0.9)], [6]
    ),
}
CYCLED = ("lr", "momentum", "betas")


def cut_by_hand(lm: Any) -> Any:
    """A new model without the layers, weights copied by name."""
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = lm.config.num_hidden_layers - len(DROP)
    smaller = type(lm)(config).train()
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            parameter.copy_(lm.get_parameter(old_name(name)))
    return smaller


def old_name(name: str) -> str:
    kept = [index for index in range(6) if index not in DROP]
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{kept[int(m[1])]}.", name)


def by_hand(
    lm: Any, data: list[Any], grouping: Callable[[Named], Any], make: Callable[[Any], Optimizer], scheduler: Any
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """A plain loop that never saw a trainer: weights and optimizer state, by name, at the end."""
    lm = copy.deepcopy(lm)
    optimizer = make(grouping(list(lm.named_parameters())))
    # What the schedule does to each group is read off a run of its own, through which no cut goes.
    dummy = make(grouping(list(copy.deepcopy(lm).named_parameters())))
    schedule = scheduler(dummy) if scheduler else None
    timetable = []
    for _ in range(BEFORE + AFTER):
        timetable.append([{k: group[k] for k in CYCLED if k in group} for group in dummy.param_groups])
        dummy.step()
        if schedule:
            schedule.step()

    def steps(model: Any, optimizer: Optimizer, first: int, count: int, groups: Iterable[int]) -> None:
        for step in range(first, first + count):
            for group, index in zip(optimizer.param_groups, groups, strict=True):
                group.update(timetable[step][index])
            optimizer.zero_grad()
            model(**data[step], use_cache=False).loss.backward()
            optimizer.step()

    num_groups = len(optimizer.param_groups)
    steps(lm, optimizer, 0, BEFORE, range(num_groups))
    smaller = cut_by_hand(lm)
    fresh = make(grouping(list(smaller.named_parameters())))
    for name, parameter in smaller.named_parameters():
        fresh.state[parameter] = copy.deepcopy(optimizer.state[lm.get_parameter(old_name(name))])
    # Layer groups are sorted: the rest first, then the layers; those of the cut layers are missing.
    survivors = [i for i in range(num_groups) if i - 1 not in DROP] if grouping is layer_groups else range(num_groups)
    steps(smaller, fresh, BEFORE, AFTER, survivors)
    return (
        {name: p.detach() for name, p in smaller.named_parameters()},
        {name: dict(fresh.state[p]) for name, p in smaller.named_parameters()},
    )


CASES = [
    *[(optimizer, layer_groups, "cosine") for optimizer in OPTIMIZERS],
    *[("adamw", layer_groups, scheduler) for scheduler in SCHEDULERS if scheduler != "cosine"],
    ("adamw", one_group, None),
    ("adamw", decay_groups, "one cycle"),
    ("sgd momentum", decay_groups, "one cycle"),
]


@pytest.mark.parametrize(("optimizer", "grouping", "scheduler"), CASES)
def test_fit_through_the_cut_is_the_loop_by_hand(
    optimizer: str, grouping: Callable[[Named], Any], scheduler: str | None, tmp_path: Any
) -> None:
    lm = tiny_lm("llama_tied")
    data = batches(BEFORE + AFTER)
    schedule = SCHEDULERS[scheduler] if scheduler else None
    expected, expected_state = by_hand(lm, data, grouping, OPTIMIZERS[optimizer], schedule)
    PruningPlan.dropping(anatomy_of(lm), DROP).save(tmp_path / "plan.json")

    class Grouped(Plain):
        def configure_optimizers(self) -> Any:
            self.make_optimizer = lambda _: OPTIMIZERS[optimizer](grouping(list(self.lm.named_parameters())))
            return super().configure_optimizers()

    module = Grouped(lm, scheduler=schedule)
    callbacks = [PlanFromFile(str(tmp_path / "plan.json")), StructuredCut(at=BEFORE)]
    trainer = fit(module, callbacks, data, max_steps=BEFORE + AFTER)
    assert trainer.global_step == BEFORE + AFTER
    actual = dict(lm.named_parameters())
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    inner = trainer.optimizers[0]
    in_optimizer = [parameter for group in inner.param_groups for parameter in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in lm.parameters()}
    assert len(inner.state) == len(in_optimizer) == len(actual)
    for name, parameter in actual.items():
        state = inner.state[parameter]
        assert state.keys() == expected_state[name].keys()
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(expected_state[name][k])) for k in state)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "lambda"])
def test_state_loads_into_what_the_user_configures_for_the_cut_model(scheduler: str) -> None:
    """What a resume relies on. (Lambdas are not in PyTorch's state: there, the user's own decide.)"""
    lm = tiny_lm()
    optimizer = OPTIMIZERS["adamw"](layer_groups(list(lm.named_parameters())))
    schedule = SCHEDULERS[scheduler](optimizer)
    lm(**batches(1)[0]).loss.backward()
    optimizer.step()
    schedule.step()
    smaller = cut_by_hand(lm)
    remove_parameters(optimizer, [schedule], [p for i in DROP for p in anatomy_of(lm).layers[i].parameters()])
    fresh = OPTIMIZERS["adamw"](layer_groups(list(smaller.named_parameters())))
    again = SCHEDULERS[scheduler](fresh)
    fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert len(optimizer.param_groups) == len(schedule.get_last_lr()) == 5
    for _ in range(6):
        assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]
        for stepped in (optimizer, fresh, schedule, again):
            stepped.step()


def test_parameters_that_were_never_in_the_optimizer_are_no_trouble() -> None:
    lm = tiny_lm()
    optimizer = torch.optim.Adam([lm.get_input_embeddings().weight], lr=1e-3)
    remove_parameters(optimizer, [], list(anatomy_of(lm).layers[0].parameters()))
    assert optimizer.param_groups[0]["params"] == [lm.get_input_embeddings().weight]


def test_an_optimizer_may_lose_all_of_its_parameters_but_not_its_last_group() -> None:
    """PyTorch's optimizers need a group: one that drove dropped layers alone keeps an empty one and does nothing."""
    lm = tiny_lm()
    removed = list(anatomy_of(lm).layers[0].parameters())
    optimizer = torch.optim.Adam(removed, lr=1e-3)
    remove_parameters(optimizer, [], removed)
    optimizer.step()
    optimizer.zero_grad()
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
