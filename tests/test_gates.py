"""Invariant 1: gates at 1 change neither loss nor gradients; and what gates elsewhere do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightprune.anatomy import anatomy_of
from lightprune.masks.gates import Bypass, Placement, ReplacedForward, attach_gate, gated
from tests.families import FAMILIES, left_padded, tiny_lm
from tests.training import assert_equal, gradients


def loss_and_gradients(lm: Any) -> tuple[Tensor, dict[str, Tensor]]:
    batch = left_padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    lm.zero_grad()
    loss = lm(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(lm)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("placement", ["residual", "output"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "scheduled"])
def test_gates_at_one_change_nothing(name: str, placement: Placement, learned: bool) -> None:
    lm = tiny_lm(name)
    loss, plain = loss_and_gradients(lm)
    layers = anatomy_of(lm).layers
    gates = torch.ones(len(layers), requires_grad=learned)
    handles = [attach_gate(layer, gates, index, placement) for index, layer in enumerate(layers)]
    gated_loss, through_gates = loss_and_gradients(lm)
    assert torch.equal(gated_loss, loss)
    assert_equal(through_gates, plain)
    if learned:
        assert gates.grad is not None
        # The final norm undoes a gate on the whole output of the last layer.
        felt = gates.grad[:-1] if placement == "output" else gates.grad
        assert felt.abs().min() > 0
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("placement", ["residual", "output"])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.8, 1.0, 1.4])
def test_gate_is_its_formula(placement: Placement, value: float) -> None:
    hidden_in, hidden_out = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden_in.requires_grad_(True)
    hidden_out.requires_grad_(True)
    gate = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    expected = value * hidden_out if placement == "output" else hidden_in + value * (hidden_out - hidden_in)
    actual = gated(hidden_in, hidden_out, gate, placement)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert gate.grad is not None
    by_hand = hidden_out if placement == "output" else hidden_out - hidden_in
    torch.testing.assert_close(gate.grad, by_hand.sum().detach())
    torch.testing.assert_close(hidden_out.grad, torch.full_like(hidden_out, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["residual", "output"])
def test_gates_keep_the_dtype_of_the_hidden_states(dtype: torch.dtype, placement: Placement) -> None:
    hidden = torch.randn(1, 2, 4, dtype=dtype)
    assert gated(hidden, hidden, torch.tensor(0.5, requires_grad=True), placement).dtype == dtype
    # Under autocast the stream may be float32 before a layer and lower behind it.
    assert gated(hidden.float(), hidden, torch.tensor(0.5), placement).dtype == dtype


def test_bypass_does_not_compute_the_layer_unless_a_cache_is_measured_there() -> None:
    lm = tiny_lm("qwen2").eval()  # its layers attend in turn to everything, a window, a window
    computed: list[int] = []
    layers = anatomy_of(lm).layers
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    bypasses = [Bypass(layer, index) for index, layer in enumerate(layers)]
    ids = left_padded()["input_ids"]
    with torch.no_grad():
        lm(input_ids=ids, use_cache=False)
        assert computed == []
        lm(input_ids=ids, use_cache=True)
        assert computed == [0, 1]
        for bypass in bypasses:
            bypass.remove()
        lm(input_ids=ids, use_cache=False)
    assert computed == [0, 1, *range(len(layers))]
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_forward_of_the_instance_comes_back(patched: bool, order: list[int]) -> None:
    """Such as Liger's or accelerate's, patched on before."""
    layers = nn.ModuleList([nn.Linear(3, 3)])
    (layer,) = layers
    stock, hidden = layer.forward, torch.randn(2, 3)
    if patched:
        layer.forward = lambda hidden: stock(hidden) + 1
    own, expected = vars(layer).get("forward"), layer(hidden)

    def doubled(forward: Any, hidden: Tensor) -> Any:
        return 2 * forward(hidden)

    handles = [ReplacedForward(layer, doubled), Bypass(layer, 0), ReplacedForward(layer, doubled)]
    left = {0, 1, 2}
    for index in order:
        below = hidden if 1 in left else expected * (2 if 0 in left else 1)
        torch.testing.assert_close(layer(hidden), below * (2 if 2 in left else 1))
        handles[index].remove()
        left.remove(index)
    handles[0].remove()
    assert vars(layer).get("forward") is own
    assert torch.equal(layer(hidden), expected)
