"""Learned gates against a loop of TRSP's stage 1 written out by hand: plain hooks, Adam from its formula."""

import copy
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune import LayerGateSelector, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.masks.gates import Placement
from tests.families import NUM_LAYERS, tiny_lm
from tests.training import Batch, Batches, Plain, Spy, assert_equal, batches, fit, trainer_for, weights

LR, L1 = 0.05, 0.02


def stage_one(
    lm: PreTrainedModel,
    data: list[Batch],
    *,
    quotas: list[int],
    steps_per_round: int,
    placement: Placement,
    restart: bool,
    candidates: list[int],
    accumulate: int,
) -> tuple[list[Tensor], list[list[int]]]:
    """The gates [L] after every optimizer step, and the layers that each round drops, smallest gate first."""
    lm = copy.deepcopy(lm).requires_grad_(False)
    layers = anatomy_of(lm).layers
    gates = torch.ones(len(layers))
    dropped: list[int] = []

    def hook(index: int) -> Any:
        def act(module: Any, inputs: Any, output: Tensor) -> Tensor:
            if index in dropped:
                return inputs[0]
            if index not in candidates:
                return output
            gate = gates[index]
            return gate * output if placement == "output" else inputs[0] + gate * (output - inputs[0])

        return act

    for index, layer in enumerate(layers):
        layer.register_forward_hook(hook(index))
    trajectory, rounds, micro = [], [], iter(data)
    first, second, count = torch.zeros(len(layers)), torch.zeros(len(layers)), 0
    for quota in quotas:
        if restart:
            gates, first, second, count = torch.ones(len(layers)), torch.zeros_like(first), torch.zeros_like(first), 0
        for _ in range(steps_per_round):
            gates.requires_grad_(True)
            gradient = torch.zeros(len(layers))
            for _ in range(accumulate):
                loss = lm(**next(micro), use_cache=False).loss
                gradient += torch.autograd.grad(loss, gates)[0] / accumulate
            remaining = torch.tensor([i in candidates and i not in dropped for i in range(len(layers))])
            gates = gates.detach()
            gradient += L1 * gates.sign() * remaining
            count += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            change = LR * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            gates = gates - change
            trajectory.append(gates)
        left = [index for index in candidates if index not in dropped]
        rounds.append(sorted(left, key=lambda index: abs(gates[index].item()))[:quota])
        dropped = dropped + rounds[-1]
    return trajectory, rounds


@pytest.mark.parametrize(
    ("placement", "rounds", "quotas", "restart", "accumulate", "protect"),
    [
        ("residual", None, [1, 1, 1], True, 1, (0, 0)),
        ("output", None, [1, 1, 1], True, 1, (0, 1)),
        ("residual", 2, [2, 1], False, 2, (1, 1)),
        ("output", 1, [3], True, 2, (1, 1)),
    ],
)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_gates_follow_the_formula(
    name: str,
    placement: Placement,
    rounds: int | None,
    quotas: list[int],
    restart: bool,
    accumulate: int,
    protect: tuple[int, int],
) -> None:
    lm, steps = tiny_lm(name), 4
    data = batches(len(quotas) * steps * accumulate)
    candidates = list(range(protect[0], NUM_LAYERS - protect[1]))
    trajectory, expected = stage_one(
        lm,
        data,
        quotas=quotas,
        steps_per_round=steps,
        placement=placement,
        restart=restart,
        candidates=candidates,
        accumulate=accumulate,
    )
    selector = LayerGateSelector(
        drop=3,
        rounds=rounds,
        steps_per_round=steps,
        lr=LR,
        l1=L1,
        placement=placement,
        restart=restart,
        protect_first=protect[0],
        protect_last=protect[1],
    )
    spy = Spy(lambda *_: (selector._round_steps, selector.state_dict()["gates"]))
    module = Plain(lm)
    before = weights(module)
    total = len(quotas) * steps
    fit(module, [spy, selector], data, max_steps=total, accumulate_grad_batches=accumulate)
    seen = [gates for _, gates in spy.seen][accumulate - 1 :: accumulate]
    assert len(seen) == len(trajectory) == total
    for actual, by_hand in zip(seen, trajectory, strict=True):
        torch.testing.assert_close(actual[candidates], by_hand[candidates], rtol=0, atol=2e-6)
    assert selector.plan is not None
    history = selector.plan.provenance["rounds"]
    assert [entry["dropped"] for entry in history] == expected
    assert selector.plan.dropped_layers == tuple(sorted(chain.from_iterable(expected)))
    for number, entry in enumerate(history):
        at_end = trajectory[(number + 1) * steps - 1]
        gone = list(chain.from_iterable(expected[:number]))
        assert set(entry["gates"]) == {str(index) for index in candidates if index not in gone}
        for index, value in entry["gates"].items():
            assert value == pytest.approx(at_end[int(index)].item(), abs=2e-6)
    assert_equal(weights(module), before)


def test_weights_move_when_they_are_not_held() -> None:
    module = Plain(tiny_lm())
    before = weights(module)
    selector = LayerGateSelector(drop=2, steps_per_round=2, hold_weights=False)
    fit(module, [selector], batches(4), max_steps=4)
    after = weights(module)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []
    assert selector.plan is not None


def test_gates_learn_along_with_weights_as_in_one_optimizer() -> None:
    """Not held: the weights' SGD step and the gates' Adam step both come from the same gradients."""
    lm, data = tiny_lm(), batches(3)
    twin = copy.deepcopy(lm)
    gates = torch.ones(NUM_LAYERS, requires_grad=True)
    for index, layer in enumerate(anatomy_of(twin).layers):
        layer.register_forward_hook(lambda m, i, o, index=index: i[0] + gates[index] * (o - i[0]))
    adam, descent = torch.optim.Adam([gates], lr=LR), torch.optim.SGD(twin.parameters(), lr=0.05)
    for batch in data:
        (twin(**batch, use_cache=False).loss + L1 * gates.abs().sum()).backward()
        for optimizer in (adam, descent):
            optimizer.step()
            optimizer.zero_grad()
    selector = LayerGateSelector(drop=1, steps_per_round=4, lr=LR, l1=L1, hold_weights=False)
    module = Plain(lm)
    fit(module, [selector], data, max_steps=3)
    torch.testing.assert_close(selector.state_dict()["gates"], gates.detach(), rtol=0, atol=1e-5)
    for name, value in weights(twin).items():
        torch.testing.assert_close(module.lm.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-5)


def test_held_weights_stand_still_under_decay_and_momentum_and_move_afterwards() -> None:
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)  # noqa: E731
    module = Plain(tiny_lm(), optimizer=optimizer)
    before = weights(module)
    spy = Spy(lambda trainer, m: weights(m))
    selector = LayerGateSelector(drop=2, steps_per_round=2, start=1)
    fit(module, [spy, selector], batches(6), max_steps=6)
    for held in spy.seen[1:5]:
        assert_equal(held, spy.seen[0])
    assert all(not torch.equal(spy.seen[0][name], before[name]) for name in before)
    assert all(not torch.equal(spy.seen[5][name], spy.seen[4][name]) for name in before)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_user_frozen_weights_stay_frozen_after_the_window() -> None:
    module = Plain(tiny_lm("llama"))
    frozen = module.lm.get_input_embeddings().weight
    frozen.requires_grad_(False)
    fit(module, [LayerGateSelector(drop=1, steps_per_round=2)], batches(3), max_steps=3)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"lm.model.embed_tokens.weight"}


def test_patience_ends_rounds_early_and_the_window_with_them() -> None:
    selector = LayerGateSelector(drop=2, steps_per_round=50, patience=2, l1=L1)
    smallest: list[list[int]] = []
    spy = Spy(lambda *_: smallest.append(selector.state_dict()["smallest"]) if selector.plan is None else None)
    fit(Plain(tiny_lm()), [spy, selector], batches(60), max_steps=60)
    assert selector.plan is not None
    history = selector.plan.provenance["rounds"]
    lengths = [entry["steps"] for entry in history]
    assert selector.plan.provenance["step"] == sum(lengths) < 100
    begin = 0
    for entry, length in zip(history, lengths, strict=True):
        ranking = smallest[begin : begin + length]
        runs = [ranking[i] == ranking[i - 1] for i in range(1, length)]
        # The first time that two steps in a row changed nothing is the round's end.
        assert runs[-2:] == [True, True]
        assert not any(a and b for a, b in pairwise(runs[:-1]))
        assert ranking[-1] == entry["dropped"]
        begin += length


def test_dropped_layers_are_bypassed_in_later_rounds_and_free_after_the_window() -> None:
    selector = LayerGateSelector(drop=2, steps_per_round=2)

    def bypassed(trainer: Any, module: Any) -> list[int]:
        return [i for i, layer in enumerate(anatomy_of(module.lm).layers) if "forward" in vars(layer)]

    spy = Spy(bypassed)
    fit(Plain(), [selector, StructuredCut(at=6, validate=False), spy], batches(5), max_steps=6)
    assert selector.plan is not None
    first = selector.plan.provenance["rounds"][0]["dropped"]
    assert spy.seen == [[], [], first, first, [], []]  # it looks before the parts move on


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Held weights leave the gates alone to carry the gradient."""

    def run(checkpointed: bool) -> list[dict[str, float]]:
        lm = tiny_lm()
        if checkpointed:
            lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
        selector = LayerGateSelector(drop=2, steps_per_round=3)
        fit(Plain(lm), [selector], batches(6), max_steps=6)
        assert selector.plan is not None
        return [entry["gates"] for entry in selector.plan.provenance["rounds"]]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert actual == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("hold", [True, False])
def test_a_second_fit_goes_on_in_the_middle_of_a_round(restart: bool, hold: bool) -> None:
    """The first stops in the second round, with a layer left out and a step of Adam behind it."""

    def run(*ends: int) -> tuple[Any, dict[str, Tensor]]:
        selector = LayerGateSelector(drop=2, steps_per_round=3, l1=L1, restart=restart, hold_weights=hold)
        module, data, done = Plain(), batches(7), 0
        trainer = trainer_for([selector], ends[0])
        for end in ends:
            trainer.fit_loop.epoch_loop.max_steps = end
            trainer.fit(module, Batches(data[done:end]))
            done = end
        assert trainer.global_step == 7
        assert selector.plan is not None
        return selector.plan, weights(module)

    (plan, moved), (expected_plan, expected) = run(4, 7), run(7)
    assert plan == expected_plan
    assert_equal(moved, expected)


def test_a_checkpoint_between_restoring_and_the_first_batch_is_the_restored_one(tmp_path: Any) -> None:
    selectors = [LayerGateSelector(drop=2, steps_per_round=3, l1=L1) for _ in range(3)]
    fit(Plain(), [selectors[0]], batches(4), 4).save_checkpoint(tmp_path / "first.ckpt")
    save = Spy(lambda trainer, _: trainer.save_checkpoint(tmp_path / "second.ckpt"), "on_train_start")
    for selector, name in zip(selectors[1:], ("first", "second"), strict=True):
        trainer = trainer_for([save, selector] if name == "first" else [selector], 6)
        rest = Batches(batches(6)[4:])
        trainer.fit(Plain(), rest, ckpt_path=tmp_path / f"{name}.ckpt", weights_only=True)
    saved = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("first", "second")]
    first, second = (checkpoint["callbacks"]["LayerGateSelector{'begins': 0}"] for checkpoint in saved)
    assert torch.equal(second["gates"], first["gates"])
    assert second["history"] == first["history"] != []
    assert selectors[1].plan is not None
    assert selectors[1].plan == selectors[2].plan
