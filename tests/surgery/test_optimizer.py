"""Invariant 4: through the cut, moments and schedules go on; compared with slicing them by hand in a plain loop."""

import copy
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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

from lightprune import ConfigError, PlanFromFile, PruningPlan, RandomSelector, RandomUnitSelector, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.surgery import check_optimizer, cut_model, remove_parameters, replace_parameter
from tests.families import combinations_of, random_plan, tiny_lm
from tests.surgery import by_hand as slices
from tests.training import Plain, batches, fit

DROP, BEFORE, AFTER = [0, 3], 4, 4
WIDTH = {
    "heads": [[0, 1], [2, 3]] * 3,
    "channels": [range(layer, layer + 30) for layer in range(6)],
    "hidden": [*range(5), *range(9, 32)],
}
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


class Lion(Optimizer):
    """arXiv 2302.06675, as its authors give it: the kind of optimizer that no list can name."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in filter(lambda p: p.grad is not None, group["params"]):
                state = self.state[parameter]
                average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                update = average.lerp(parameter.grad, 1 - group["betas"][0]).sign_()
                parameter.add_(update, alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - group["betas"][1])
        return loss


# All others of PyTorch's whose state is of the parameters' shapes, and one of a stranger's.
OTHERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=2e-3),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=2e-3),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=2e-3),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=2e-3),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=2e-4, momentum=0.9, centered=True),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=2e-4),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=2e-3, t0=2),
    "lion": lambda groups: Lion(groups, lr=1e-3),
}


def rates(optimizer: Optimizer, factor: float) -> list[float]:
    return [factor * group["lr"] for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, [lambda s, i=i: 1 / (1 + s + i) for i in range(len(o.param_groups))]),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: OneCycleLR(o, max_lr=rates(o, 5), total_steps=12),
    "cyclic": lambda o: CyclicLR(o, base_lr=rates(o, 1), max_lr=rates(o, 5), step_size_up=3, cycle_momentum=False),
    "cyclic with momentum": lambda o: CyclicLR(o, base_lr=rates(o, 1), max_lr=rates(o, 5), step_size_up=3),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 9)], [3]),
    "sequential across the cut": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=6), ExponentialLR(o, 0.9)], [6]
    ),
}
CYCLED = ("lr", "momentum", "betas")


def plan_for(lm: Any, width: bool) -> PruningPlan:
    anatomy = anatomy_of(lm)
    return PruningPlan.keeping(anatomy, layers=[1, 2, 4, 5], **(WIDTH if width else {}))


def cut_by_hand(lm: Any, plan: PruningPlan) -> Any:
    """A new model of the smaller sizes, with weights copied row by row."""
    config = type(lm.config).from_dict(slices.config_fields(lm.config.to_dict(), plan))
    smaller = type(lm)(config).train()
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            old = old_name(name)
            parameter.copy_(torch.from_numpy(slices.sliced(old, lm.get_parameter(old).detach().numpy(), plan)))
    return smaller


def state_by_hand(name: str, state: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """What belongs to the rows that stay; counts of steps and the like are no rows."""
    return {
        key: torch.from_numpy(slices.sliced(name, value.numpy(), plan))
        if torch.is_tensor(value) and value.ndim > 0
        else copy.deepcopy(value)
        for key, value in state.items()
    }


def old_name(name: str) -> str:
    kept = [index for index in range(6) if index not in DROP]
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{kept[int(m[1])]}.", name)


def by_hand(
    lm: Any,
    data: list[Any],
    plan: PruningPlan,
    grouping: Callable[[Named], Any],
    make: Callable[[Any], Optimizer],
    scheduler: Any,
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
    smaller = cut_by_hand(lm, plan)
    fresh = make(grouping(list(smaller.named_parameters())))
    for name, parameter in smaller.named_parameters():
        old = old_name(name)
        fresh.state[parameter] = state_by_hand(old, optimizer.state[lm.get_parameter(old)], plan)
    # Layer groups are sorted: the rest first, then the layers; those of the cut layers are missing.
    survivors = [i for i in range(num_groups) if i - 1 not in DROP] if grouping is layer_groups else range(num_groups)
    steps(smaller, fresh, BEFORE, AFTER, survivors)
    return (
        {name: p.detach() for name, p in smaller.named_parameters()},
        {name: dict(fresh.state[p]) for name, p in smaller.named_parameters()},
    )


CASES = [
    *[(optimizer, layer_groups, "cosine") for optimizer in OPTIMIZERS],
    *[(optimizer, decay_groups, None) for optimizer in OTHERS],
    *[("adamw", layer_groups, scheduler) for scheduler in SCHEDULERS if scheduler != "cosine"],
    ("adamw", one_group, None),
    ("adamw", decay_groups, "one cycle"),
    ("sgd momentum", decay_groups, "one cycle"),
]


@pytest.mark.parametrize("width", [False, True])
@pytest.mark.parametrize(("optimizer", "grouping", "scheduler"), CASES)
def test_fit_through_the_cut_is_the_loop_by_hand(
    optimizer: str, grouping: Callable[[Named], Any], scheduler: str | None, width: bool, tmp_path: Any
) -> None:
    lm = tiny_lm("llama_tied")
    data = batches(BEFORE + AFTER)
    schedule = SCHEDULERS[scheduler] if scheduler else None
    plan = plan_for(lm, width)
    expected, expected_state = by_hand(lm, data, plan, grouping, (OPTIMIZERS | OTHERS)[optimizer], schedule)
    plan.save(tmp_path / "plan.json")

    class Grouped(Plain):
        def configure_optimizers(self) -> Any:
            self.make_optimizer = lambda _: (OPTIMIZERS | OTHERS)[optimizer](grouping(list(self.lm.named_parameters())))
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


def test_muon_beside_adamw_goes_through_the_cut(tmp_path: Any) -> None:
    """Its matrices' momentum is sliced; two optimizers are stepped by hand."""
    lm = tiny_lm("llama_tied")
    data, plan = batches(BEFORE + AFTER), plan_for(lm, width=True)

    def make(model: Any) -> list[Optimizer]:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]

    def steps(model: Any, optimizers: list[Optimizer], batches: Any) -> None:
        for batch in batches:
            model.zero_grad()
            model(**batch, use_cache=False).loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    twin = copy.deepcopy(lm)
    optimizers = make(twin)
    steps(twin, optimizers, data[:BEFORE])
    smaller = cut_by_hand(twin, plan)
    fresh = make(smaller)
    for name, parameter in smaller.named_parameters():
        old = twin.get_parameter(old_name(name))
        before, after = next((o, f) for o, f in zip(optimizers, fresh, strict=True) if old in o.state)
        after.state[parameter] = state_by_hand(old_name(name), before.state[old], plan)
    steps(smaller, fresh, data[BEFORE:])

    class Two(Plain):
        def __init__(self) -> None:
            super().__init__(lm)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.lm.zero_grad()
            self.manual_backward(self.lm(**batch, use_cache=False).loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return make(self.lm)

    plan.save(tmp_path / "plan.json")
    fit(Two(), [PlanFromFile(str(tmp_path / "plan.json")), StructuredCut(at=2 * BEFORE)], data, 2 * (BEFORE + AFTER))
    expected = dict(smaller.named_parameters())
    assert [name for name, p in lm.named_parameters() if not torch.equal(p, expected[name])] == []


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "lambda"])
def test_state_loads_into_what_the_user_configures_for_the_cut_model(scheduler: str) -> None:
    """What a resume relies on. (Lambdas are not in PyTorch's state: there, the user's own decide.)"""
    lm = tiny_lm()
    optimizer = OPTIMIZERS["adamw"](layer_groups(list(lm.named_parameters())))
    schedule = SCHEDULERS[scheduler](optimizer)
    lm(**batches(1)[0]).loss.backward()
    optimizer.step()
    schedule.step()
    smaller = cut_by_hand(lm, plan_for(lm, width=False))
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


# Width alone, in every kind of layout: separate, fused, interleaved, transposed projections; norms over all heads.


def trained(lm: Any, make: Callable[[Any], Optimizer], steps: int) -> Optimizer:
    optimizer = make(list(lm.parameters()))
    train(lm, optimizer, batches(steps))
    return optimizer


def train(lm: Any, optimizer: Optimizer, data: Iterable[Any]) -> None:
    for batch in data:
        optimizer.zero_grad()
        lm(**batch, use_cache=False).loss.backward()
        optimizer.step()


LAYOUTS = ["llama_tied", "phi3", "olmo2", "opt", "opt_projected", "gpt2", "gpt_neox", "phi", "gemma3", "mixtral"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*[(name, "adamw") for name in LAYOUTS], *[("llama_tied", name) for name in OPTIMIZERS if name != "adamw"]],
)
def test_moments_go_with_their_rows(name: str, optimizer: str) -> None:
    lm = tiny_lm(name)
    inner = trained(lm, (OPTIMIZERS | OTHERS)[optimizer], 3)
    plan = random_plan(anatomy_of(lm), combinations_of(lm)[-1], random.Random(name))
    removed = [parameter for index in plan.dropped_layers for parameter in anatomy_of(lm).layers[index].parameters()]
    before = {
        slices.new_name(key, plan): {
            entry: slices.sliced(key, value.numpy().copy(), plan) if value.ndim else float(value)
            for entry, value in inner.state[parameter].items()
            if value is not None
        }
        for key, parameter in lm.named_parameters()
    }
    replaced: list[nn.Parameter] = []

    def on_replace(old: nn.Parameter, new: nn.Parameter, rows: Any) -> None:
        replaced.append(old)
        replace_parameter(inner, old, new, rows)

    cut_model(anatomy_of(lm), plan, on_replace)
    remove_parameters(inner, [], removed)

    assert len({id(old) for old in replaced}) == len(replaced) > 0
    in_optimizer = [parameter for group in inner.param_groups for parameter in group["params"]]
    assert [id(p) for p in in_optimizer] == [id(p) for p in lm.parameters()]
    assert len(inner.state) == len(in_optimizer)
    for key, parameter in lm.named_parameters():
        state = {entry: value for entry, value in inner.state[parameter].items() if value is not None}
        assert state.keys() == before[key].keys()
        for entry, value in state.items():
            assert value.ndim == 0 or value.shape == parameter.shape
            np.testing.assert_array_equal(value.numpy(), before[key][entry])

    # Every parameter moves on, and moments that went with their rows hold no old storage.
    was = {key: parameter.detach().clone() for key, parameter in lm.named_parameters()}
    train(lm, inner, batches(2, seed=7))
    still = [key for key, parameter in lm.named_parameters() if torch.equal(parameter, was[key])]
    # With a single step of a mixture, some experts see no token.
    assert not still or name == "mixtral"
    if optimizer != "sgd momentum":
        assert {int(inner.state[parameter]["step"]) for parameter in lm.parameters()} == {5}
    for parameter in lm.parameters():
        for value in inner.state[parameter].values():
            assert value is None or value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_frozen_and_foreign_parameters_are_no_trouble() -> None:
    """What is frozen stays frozen; what an optimizer never drove, it does not drive now."""
    lm = tiny_lm("llama_tied")
    lm.model.layers[0].mlp.requires_grad_(False)
    driven = list(lm.model.layers[1].parameters())
    inner = torch.optim.Adam(driven, lr=1e-3)
    train(lm, inner, batches(1))
    plan = random_plan(anatomy_of(lm), ("kv_groups", "channels", "hidden"), random.Random(0))
    cut_model(anatomy_of(lm), plan, lambda old, new, rows: replace_parameter(inner, old, new, rows))
    assert {p.requires_grad for p in lm.model.layers[0].mlp.parameters()} == {False}
    assert {p.requires_grad for p in lm.model.layers[0].self_attn.parameters()} == {True}
    assert [id(p) for p in inner.param_groups[0]["params"]] == [id(p) for p in lm.model.layers[1].parameters()]
    assert set(inner.state) == set(lm.model.layers[1].parameters())


ALLOWED = OPTIMIZERS | OTHERS | {"sgd": lambda groups: torch.optim.SGD(groups, lr=0.1)}


@pytest.mark.parametrize("optimizer", ALLOWED.values(), ids=ALLOWED)
def test_optimizers_whose_state_has_the_parameters_shapes_pass(optimizer: Callable[[Any], Optimizer]) -> None:
    """Whether they have stepped or not, and asking them changes nothing."""
    parameters = [nn.Parameter(torch.rand(*shape)) for shape in ((6, 4), (4,), (2, 3, 4))]
    asked = optimizer([{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:]}])
    before, generator = copy.deepcopy(asked.state_dict()), torch.get_rng_state()
    check_optimizer(asked)
    assert torch.equal(torch.get_rng_state(), generator)
    assert str(asked.state_dict()) == str(before)
    assert all(parameter.grad is None for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    asked.step()
    check_optimizer(asked)


def test_muon_passes_for_its_matrices() -> None:
    check_optimizer(torch.optim.Muon([nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4, 4))], lr=0.1))


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("schedulefree", lambda m, p: m.AdamWScheduleFree(p, lr=0.1)),
        ("schedulefree", lambda m, p: m.SGDScheduleFree(p, lr=0.1)),
        ("lion_pytorch", lambda m, p: m.Lion(p)),
    ],
)
def test_optimizers_of_others_pass(package: str, make: Any) -> None:
    check_optimizer(make(pytest.importorskip(package), [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]))


class Wrapper(Optimizer):
    """Around another optimizer, as sharpness-aware and look-ahead ones are."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.SGD(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})


class InBlocks(Optimizer):
    """Keeps a number for each 256 of a large parameter, and leaves small ones alone: 8-bit optimizers do so."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.numel() >= 4096:
                self.state[parameter]["absmax"] = parameter.grad.view(-1, 256).abs().amax(1)


class History(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("gradients", []).append(parameter.grad)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.Adafactor, r"its state 'row_var' is a Tensor \[256, 1\] for a parameter \[256, 384\]"),
        (torch.optim.SparseAdam, r"a copy of it cannot step to show its state \(RuntimeError: "),
        (Wrapper, r"it wraps another optimizer, SGD"),
        (InBlocks, r"its state 'absmax' is a Tensor \[384\]"),
        (History, r"its state 'gradients' is a list"),
    ],
)
def test_other_optimizers_are_refused_by_name(make: Callable[[Any], Optimizer], reason: str) -> None:
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    name = type(optimizer).__name__
    with pytest.raises(ConfigError, match=rf"state of {name} through a cut in width, since {reason}.*`optimizer`"):
        check_optimizer(optimizer)


@pytest.mark.parametrize("selector", [RandomSelector(drop=1), RandomUnitSelector(channels=16)])
def test_a_second_list_of_parameters_is_refused_in_depth_and_in_width(
    selector: RandomSelector | RandomUnitSelector,
) -> None:
    module = Plain(optimizer=lambda parameters: torch.optim.LBFGS(parameters))
    with pytest.raises(ConfigError, match=r"cannot take parameters out of LBFGS, which keeps .* in `_params`"):
        fit(module, [selector, StructuredCut(at=1)], batches(2), max_steps=2)


def test_an_optimizer_of_flat_tensors_is_tried_out_with_one() -> None:
    """Under ZeRO its groups may be empty between steps."""
    optimizer = InBlocks([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"] = []
    check_optimizer(optimizer)
    with pytest.raises(ConfigError, match=r"its state 'absmax' is a Tensor \[32\]"):
        check_optimizer(optimizer, flat=torch.device("cpu"))


def test_an_optimizer_that_cannot_be_carried_is_refused_before_the_first_step() -> None:
    class NoStep(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("training began")

    parts = [RandomUnitSelector(channels=32), StructuredCut(at=1, validate=False)]
    with pytest.raises(ConfigError, match="state of Adafactor through a cut in width"):
        fit(NoStep(optimizer=torch.optim.Adafactor), parts, batches(2), 2)
    module = Plain(optimizer=torch.optim.Adafactor)
    fit(module, [RandomSelector(drop=2), StructuredCut(at=1, validate=False)], batches(3), 3)
    assert len(module.lm.model.layers) == 4


@pytest.mark.parametrize(
    "grouping", [lambda named: named, lambda named: [{"params": named[::2]}, {"params": named[1::2]}]]
)
def test_names_go_with_their_parameters(grouping: Callable[[Named], Any]) -> None:
    module = Plain(optimizer=lambda parameters: torch.optim.AdamW(grouping(list(module.named_parameters()))))
    selector = RandomSelector(drop=2)
    trainer = fit(module, [selector, StructuredCut(at=2)], batches(3), max_steps=3)
    assert selector.plan is not None
    kept = [index for index in range(6) if index not in selector.plan.dropped_layers]
    there = {parameter: name for name, parameter in module.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        renamed = [
            re.sub(r"layers\.(\d+)", lambda m: f"layers.{kept.index(int(m[1]))}", n) for n in group["param_names"]
        ]
        assert [there[parameter] for parameter in group["params"]] == renamed
