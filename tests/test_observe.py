"""Watching the LM's calls, whichever way they are made."""

import inspect
from typing import Any

import pytest
import torch

from lightprune.anatomy import anatomy_of
from lightprune.masks.forward_passes import TokenMask, call_inputs, on_output
from lightprune.masks.gates import attach_gate
from tests.families import left_padded, tiny_lm


@pytest.mark.parametrize("positional", [True, False])
def test_mean_is_over_tokens_that_are_not_padding(positional: bool) -> None:
    lm, batch = tiny_lm(), left_padded()
    tokens = TokenMask()
    handle = tokens.watch(lm)
    values = torch.randn(3, 12)
    with torch.no_grad():
        lm(*batch.values()) if positional else lm(**batch)
    real = [values[b, t].item() for b in range(3) for t in range(12) if batch["attention_mask"][b, t]]
    assert len(real) == 30
    assert tokens.mean(values).item() == pytest.approx(sum(real) / len(real), abs=1e-6)
    with torch.no_grad():
        lm(batch["input_ids"])
    assert tokens.mean(values).item() == pytest.approx(values.mean().item(), abs=1e-6)
    handle.remove()
    assert not lm._forward_pre_hooks


def test_a_mask_of_another_shape_is_not_applied() -> None:
    """With a cache the mask covers earlier tokens too; a 4-D mask says nothing of padding."""
    values = torch.randn(2, 5)
    for mask in (torch.zeros(2, 9), torch.zeros(2, 1, 5, 5), None):
        tokens = TokenMask(mask)
        torch.testing.assert_close(tokens.mean(values), values.mean())


def test_nothing_but_padding_gives_zero_and_not_nan() -> None:
    assert TokenMask(torch.zeros(1, 3)).mean(torch.ones(1, 3)) == 0


def test_output_is_the_layers_own_before_any_gate() -> None:
    lm, batch = tiny_lm(), left_padded()
    layer = anatomy_of(lm).layers[2]
    plain: list[Any] = []
    handle = layer.register_forward_hook(lambda m, i, o: plain.append((i[0], o)))
    lm(**batch)
    handle.remove()
    seen: list[Any] = []
    attach_gate(layer, torch.zeros(6), 2, "residual")
    on_output(layer, lambda hidden_in, hidden_out: seen.append((hidden_in, hidden_out)))
    lm(**batch)
    assert torch.equal(seen[0][0], plain[0][0])
    assert torch.equal(seen[0][1], plain[0][1])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_call_inputs_by_name(name: str) -> None:
    ids, mask, labels = torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)
    lm = tiny_lm(name)
    for module in (lm, anatomy_of(lm).decoder):
        second = list(inspect.signature(module.forward).parameters)[1]  # of GPT-2 it is no mask
        found = call_inputs(module, (ids, mask), {"labels": labels, "use_cache": False})
        assert set(found) == {"input_ids", second, "labels"}
        assert call_inputs(module, (), {"input_ids": ids, "labels": None})["input_ids"].data_ptr() == ids.data_ptr()
        assert set(call_inputs(module, (ids, None), {"attention_mask": None})) == {"input_ids"}
