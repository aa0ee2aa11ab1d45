"""The proximal group lasso against soft thresholding written out group by group, and the cut that it empties."""

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune import ProximalGroupLasso, StructuredCut
from lightprune.anatomy import anatomy_of
from lightprune.surgery import cut_model
from tests.families import FAMILIES, combinations_of, left_padded, random_plan, tiny_lm
from tests.regularizers.by_hand import REMOVED, SLICES, STAY, from_file, norm_of, plan_for
from tests.training import Plain, Spy, assert_close, assert_equal, batches, fit, weights

RATE, BIAS_RATE = 0.05, 0.01


def two_rates(parameters: Any) -> torch.optim.Optimizer:
    """Matrices and vectors learn at different rates."""
    every = list(parameters)
    return torch.optim.SGD(
        [
            {"params": [p for p in every if p.ndim > 1], "lr": RATE},
            {"params": [p for p in every if p.ndim == 1], "lr": BIAS_RATE},
        ]
    )


def groups_of(name: str, lm: PreTrainedModel) -> list[list[Tensor]]:
    """Every group that goes, as views, structure after structure."""
    units = [unit for unit in ("heads", "kv_groups", "channels", "hidden") if unit in REMOVED[name]]
    return [SLICES[name](lm, unit, layer, index, STAY) for unit in units for layer, index in REMOVED[name][unit]]


@pytest.mark.parametrize("strength", [2.0, 5.0])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_step_is_the_optimizers_and_then_soft_thresholding(name: str, strength: float, tmp_path: Any) -> None:
    """tau is 0.1 and 0.02, or 0.25 and 0.05; norms are about 0.2, so that matrices vanish in the second case."""
    lm, (batch,) = tiny_lm(name), batches(1)
    twin = copy.deepcopy(lm)
    twin(**batch, use_cache=False).loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= (RATE if parameter.ndim > 1 else BIAS_RATE) * parameter.grad
        for group in groups_of(name, twin):
            norm = norm_of(group, "l2")
            for piece in group:
                rate = RATE if piece._base.ndim > 1 else BIAS_RATE
                piece *= max(0.0, 1 - strength * rate / norm.item())

    part = ProximalGroupLasso(strength, stop=4)
    fit(Plain(lm, two_rates), [from_file(plan_for(name, lm), tmp_path), part], [batch], max_steps=1)
    assert_close(weights(lm), weights(twin), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_strength_norms_fall_evenly_to_zero(accumulate: int, tmp_path: Any) -> None:
    """In a window from step 1 to step 5, of weights that only the projection moves; once every optimizer step."""
    lm = tiny_lm()
    start = weights(lm)
    before = [[piece.detach().clone() for piece in group] for group in groups_of("llama_tied", lm)]
    module = Plain(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    selector = from_file(plan_for("llama_tied", lm, "layers", "heads", "channels"), tmp_path)
    dimensions = len(REMOVED["llama_tied"]["hidden"])

    def left() -> set[float]:
        now = groups_of("llama_tied", lm)[:-dimensions]
        pairs = [pair for b, n in zip(before, now, strict=False) for pair in zip(b, n, strict=True)]
        return {round(float(new.norm() / old.norm()), 5) for old, new in pairs}

    spy = Spy(lambda trainer, m: (trainer.global_step, left()), "on_train_batch_end")
    data = batches(6 * accumulate)
    fit(
        module,
        [spy, selector, ProximalGroupLasso(start=1, stop=5)],
        data,
        max_steps=6,
        accumulate_grad_batches=accumulate,
    )
    assert dict(spy.seen[accumulate - 1 :: accumulate]) == {1: {1}, 2: {0.75}, 3: {0.5}, 4: {0.25}, 5: {0}, 6: {0}}
    # What stays is not touched, bit for bit.
    touched = torch.zeros(48, dtype=torch.bool)
    touched[[1, 8, 40]] = True
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(lm.get_parameter(name)[:, ~touched], start[name][:, ~touched])
    untouched = [n for n in start if ".layers.2." in n or "norm" in n or "embed" in n or n.endswith("down_proj.bias")]
    assert_equal({n: weights(lm)[n] for n in untouched}, {n: start[n] for n in untouched})


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_windows_end_groups_are_exactly_zero_and_a_cut_changes_nothing(name: str, tmp_path: Any) -> None:
    """For channels, heads inside groups and key-value groups, together where the family lets them go without hidden."""
    lm = tiny_lm(name)
    possible = [c for c in combinations_of(lm) if not {"hidden", "layers"} & set(c)]
    if name == "olmo2":  # its query and key norms run over all heads, zeros as well
        possible = [("channels",)]
    anatomy = anatomy_of(lm)
    plan = random_plan(anatomy, possible[-1], random.Random(0))
    before = weights(lm)
    module = Plain(lm, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, [from_file(plan, tmp_path), ProximalGroupLasso(stop=3)], batches(4), max_steps=4)
    assert any(not torch.equal(before[n], p) for n, p in lm.named_parameters())

    batch = left_padded()
    lm.eval()
    with torch.no_grad():
        whole = lm(**batch, use_cache=False).logits
        zeros = {n: int((p == 0).sum()) for n, p in lm.named_parameters()}
        lost = {n: p.numel() for n, p in lm.named_parameters()}
        cut_model(anatomy, plan)
        cut = lm(**batch, use_cache=False).logits
    lost = {n: count - lm.get_parameter(n).numel() for n, count in lost.items()}
    assert zeros == lost
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_validation_sees_no_cut(tmp_path: Any) -> None:
    lm = tiny_lm()
    cut = StructuredCut(at=4)
    selector = from_file(plan_for("llama_tied", lm, "heads", "channels"), tmp_path)
    fit(Plain(lm), [selector, ProximalGroupLasso(), cut], batches(5), max_steps=5)
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=1e-5)


@pytest.mark.parametrize(("dtype", "warns"), [(torch.bfloat16, True), (torch.float32, False)])
def test_steps_that_half_precision_loses_are_said(dtype: torch.dtype, warns: bool, tmp_path: Any) -> None:
    lm = tiny_lm().to(dtype)
    parts = [from_file(plan_for("llama_tied", lm), tmp_path), ProximalGroupLasso(stop=200)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(Plain(lm), parts, batches(1), max_steps=1)
    assert any("are lost in rounding" in str(warning.message) for warning in found) == warns
