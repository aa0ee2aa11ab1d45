"""The difference penalty against its formula, computed outside the trainer."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightprune import ConfigError, DifferencePenalty, GateAnnealing, PlanFromFile, PruningPlan, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.regularizers.difference import Norm, layer_difference
from tests.families import FAMILIES, left_padded, tiny_lm
from tests.training import Batch, Plain, Spy, assert_close, assert_equal, batches, fit, gradients, weights

DROP = [1, 4]
STRENGTH = 0.7


@pytest.fixture
def plan_file(tmp_path: Any) -> Any:
    def write(lm: PreTrainedModel, drop: list[int]) -> PlanFromFile:
        path = tmp_path / "plan.json"
        PruningPlan.dropping(anatomy_of(lm), drop).save(path)
        return PlanFromFile(str(path))

    return write


def padded(seed: int = 0) -> Batch:
    batch = left_padded(seed=seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def by_hand(
    lm: PreTrainedModel, batch: Batch, drop: list[int], norm: Norm, relative: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The LM loss, and each chosen layer's mean difference over the tokens that are not padding."""
    states: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda m, i, o, index=index: states.update({index: (i[0], o)}))
        for index, layer in enumerate(anatomy_of(lm).layers)
    ]
    loss = lm(**batch, use_cache=False).loss
    for handle in handles:
        handle.remove()
    means = []
    for index in drop:
        hidden_in, hidden_out = states[index]
        per_token = []
        for b, t in batch["attention_mask"].nonzero().tolist():
            change, size = hidden_out[b, t] - hidden_in[b, t], hidden_in[b, t].detach()
            if norm == "l2":
                value = torch.linalg.vector_norm(change) / math.sqrt(change.numel())
                value = value / (torch.linalg.vector_norm(size) / math.sqrt(size.numel())) if relative else value
            else:
                value = change.abs().sum() / change.numel()
                value = value / (size.abs().sum() / size.numel()) if relative else value
            per_token.append(value)
        means.append(torch.stack(per_token).mean())
    return loss, means


def fitted_gradients(
    module: Plain, callbacks: list[Any], data: list[Batch], max_steps: int = 1, **kwargs: Any
) -> dict[str, Tensor]:
    """Those of the first step."""
    spy = Spy(lambda trainer, m: gradients(m), "on_before_optimizer_step")
    fit(module, [spy, *callbacks], data, max_steps, **kwargs)
    return {name.removeprefix("lm."): value for name, value in spy.seen[0].items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("norm", "relative"), [("l2", False), ("l1", False), ("l2", True), ("l1", True)])
def test_gradient_is_that_of_the_formula(name: str, norm: Norm, relative: bool, plan_file: Any) -> None:
    lm, batch = tiny_lm(name), padded()
    twin = copy.deepcopy(lm)
    loss, means = by_hand(twin, batch, DROP, norm, relative)
    (loss + STRENGTH * torch.stack(means).sum()).backward()
    penalty = DifferencePenalty(STRENGTH, norm=norm, relative=relative, stop=4)
    actual = fitted_gradients(Plain(lm), [plan_file(lm, DROP), penalty], [batch])
    assert_close(actual, gradients(twin), rtol=1e-4, atol=1e-5)


def test_status_is_the_unweighted_penalty(plan_file: Any) -> None:
    lm, batch = tiny_lm(), padded()
    _, means = by_hand(copy.deepcopy(lm), batch, DROP, "l2")
    penalty = DifferencePenalty(STRENGTH, relative=False, stop=4)
    spy = Spy(lambda *_: penalty.status())
    fit(Plain(lm), [spy, plan_file(lm, DROP), penalty], [batch], max_steps=1)
    assert spy.seen[0]["difference"] == pytest.approx(sum(means).item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_reduction_does_not_depend_on_batch_length_or_width(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_in, hidden_out = torch.randn(2, 3, 7, 16, generator=generator)
    once = layer_difference(hidden_in, hidden_out, norm)
    assert once.shape == (3, 7)
    for dim in (0, 1):
        twice = layer_difference(hidden_in.repeat_interleave(2, dim), hidden_out.repeat_interleave(2, dim), norm)
        torch.testing.assert_close(twice.mean(), once.mean())
    # Doubling the width by repeating every dimension leaves the root mean square and the mean as they are.
    wide = layer_difference(hidden_in.repeat(1, 1, 2), hidden_out.repeat(1, 1, 2), norm)
    torch.testing.assert_close(wide, once)
    narrow, wide = (
        layer_difference(*torch.randn(2, 8, 64, width, generator=generator), norm).mean().item() for width in (64, 4096)
    )
    assert narrow == pytest.approx(wide, rel=0.02)


def test_a_layer_that_does_nothing_has_a_finite_gradient() -> None:
    hidden = torch.randn(1, 2, 4, requires_grad=True)
    layer_difference(hidden.detach(), hidden, "l2").sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_padding_whose_embedding_is_zero_divides_by_nothing(norm: Norm, plan_file: Any) -> None:
    """As that of a configured `pad_token_id` is."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.get_input_embeddings().weight[0] = 0
    parts = [plan_file(lm, [0]), DifferencePenalty(STRENGTH, norm=norm, relative=True, stop=4)]
    found = fitted_gradients(Plain(lm), parts, [padded()])
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_padding_does_not_count(plan_file: Any) -> None:
    """What padding tokens say, and how many there are on the right, changes nothing."""
    short = batches(1, batch=2, length=8)[0]
    long = {
        "input_ids": torch.cat([short["input_ids"], torch.full((2, 4), 7)], 1),
        "attention_mask": torch.cat([short["attention_mask"], torch.zeros(2, 4, dtype=torch.int64)], 1),
        "labels": torch.cat([short["labels"], torch.full((2, 4), -100)], 1),
    }
    both = [
        fitted_gradients(
            Plain(lm := tiny_lm("llama")),
            [plan_file(lm, DROP), DifferencePenalty(STRENGTH, relative=False, stop=4)],
            [b],
        )
        for b in (short, long)
    ]
    assert_close(both[0], both[1], rtol=1e-4, atol=1e-5)


def test_accumulation_equals_one_big_batch(plan_file: Any) -> None:
    pieces = batches(4)
    whole = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def gradient(data: list[Batch], accumulate: int) -> dict[str, Tensor]:
        lm = tiny_lm()
        parts = [plan_file(lm, DROP), DifferencePenalty(STRENGTH, relative=False, stop=4)]
        return fitted_gradients(Plain(lm), parts, data, accumulate_grad_batches=accumulate)

    assert_close(gradient(pieces, 4), gradient([whole], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool, plan_file: Any) -> None:
    def gradient(checkpointed: bool) -> dict[str, Tensor]:
        lm = tiny_lm(name)
        if checkpointed:
            lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
            lm.enable_input_require_grads()
        parts = [plan_file(lm, DROP), DifferencePenalty(STRENGTH, relative=False), GateAnnealing(), StructuredCut(at=4)]
        return fitted_gradients(Plain(lm), parts, [padded()], max_steps=4)

    assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


def test_difference_is_the_layers_own_under_annealing(plan_file: Any) -> None:
    """Before the gate, whichever of the two callbacks comes first."""
    results = []
    for swap in (False, True):
        lm, batch = tiny_lm(), padded()
        twin = copy.deepcopy(lm)
        states: dict[int, tuple[Tensor, Tensor]] = {}

        def hook(index: int, states: dict[int, tuple[Tensor, Tensor]] = states) -> Any:
            def act(module: Any, inputs: Any, output: Tensor) -> Tensor:
                states[index] = (inputs[0], output)
                return inputs[0] + 0.75 * (output - inputs[0])

            return act

        for index in DROP:
            anatomy_of(twin).layers[index].register_forward_hook(hook(index))
        loss = twin(**batch, use_cache=False).loss
        mask = batch["attention_mask"] == 1
        penalty = sum(((o - i).square().mean(-1).sqrt())[mask].mean() for i, o in states.values())
        (loss + STRENGTH * penalty).backward()
        parts = [DifferencePenalty(STRENGTH, relative=False), GateAnnealing(), StructuredCut(at=4)]
        parts = parts[::-1] if swap else parts
        actual = fitted_gradients(Plain(lm), [plan_file(lm, DROP), *parts], [batch], max_steps=4)
        results.append((actual, gradients(twin)))
    for actual, expected in results:
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ramp", "order", "expected"),
    [
        # Per training step, the weight of layers 1 and 4 in the penalty, in a window from step 1 to step 5.
        ("constant", "joint", [(0, 0), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]),
        ("linear", "joint", [(0, 0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1, 1), (1, 1)]),
        ("linear", "first_to_last", [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (1, 1)]),
        ("linear", "last_to_first", [(0, 0), (0, 0.5), (0, 1), (0.5, 1), (1, 1), (1, 1)]),
        ("constant", "first_to_last", [(0, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_strength_follows_its_ramp(ramp: Any, order: Any, expected: list[tuple[float, float]], plan_file: Any) -> None:
    """Weights stand still under a zero learning rate, so the gradient alone tells which layers weigh how much."""
    lm, batch = tiny_lm(num_layers=6), padded()
    twin = copy.deepcopy(lm)
    loss, (one, four) = by_hand(twin, batch, DROP, "l2")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = twin.get_parameter(name)
    from_loss, from_one, from_four = (
        torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, one, four)
    )
    module = Plain(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    spy = Spy(lambda trainer, m: m.lm.get_parameter(name).grad.clone(), "on_before_optimizer_step")
    parts = [plan_file(lm, DROP), DifferencePenalty(STRENGTH, relative=False, ramp=ramp, order=order, start=1, stop=5)]
    fit(module, [spy, *parts, StructuredCut(at=6, validate=False)], [batch] * 6, max_steps=6)
    assert len(spy.seen) == 6
    for actual, (first, second) in zip(spy.seen, expected, strict=True):
        by_formula = from_loss + STRENGTH * (first * from_one + second * from_four)
        torch.testing.assert_close(actual, by_formula, rtol=1e-4, atol=1e-5)


def test_validation_adds_nothing_to_the_next_step(plan_file: Any) -> None:
    """Forward passes of a validation loop between two steps are not part of any penalty."""

    def run(check: int | None) -> dict[str, Tensor]:
        lm = tiny_lm()
        module = Plain(lm)
        kwargs: dict[str, Any] = {"val_check_interval": check} if check else {"limit_val_batches": 0}
        fit(
            module,
            [plan_file(lm, DROP), DifferencePenalty(STRENGTH, relative=False, stop=4)],
            batches(3),
            max_steps=3,
            **kwargs,
        )
        return {name: p.detach() for name, p in module.named_parameters()}

    plain, validated = run(None), run(1)
    assert all(torch.equal(plain[name], validated[name]) for name in plain)


def checkpoint_calls(lm: PreTrainedModel) -> None:
    """Checkpoint the calls of layers, with all hooks, as transformers did before 5.23, and as an owner may do."""
    kind = type(anatomy_of(lm).layers[0])

    class Checkpointed(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=True)

    for layer in anatomy_of(lm).layers:
        layer.__class__ = Checkpointed


def test_layers_that_run_without_gradients_are_refused(plan_file: Any) -> None:
    module = Plain()
    checkpoint_calls(module.lm)
    before = weights(module)
    with pytest.raises(ConfigError, match=r"DifferencePenalty would do nothing.*ran without gradients"):
        fit(module, [plan_file(module.lm, DROP), DifferencePenalty(STRENGTH, stop=4)], batches(2), max_steps=2)
    assert_equal(weights(module), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_that_transformers_would_checkpoint_are_refused(
    reentrant: bool, plan_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before 5.23, by what tells those versions apart."""
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False)
    module = Plain()
    module.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    parts = [plan_file(module.lm, DROP), DifferencePenalty(STRENGTH, stop=4)]
    before = weights(module)
    with pytest.raises(
        ConfigError, match=r"hooks of DifferencePenalty twice: install transformers>=5.23 .*, or switch"
    ):
        fit(module, parts, batches(2), max_steps=2)
    assert_equal(weights(module), before)
    fit(module, [plan_file(module.lm, DROP), StructuredCut(at=1)], batches(2), max_steps=2)  # no hooks on layers
