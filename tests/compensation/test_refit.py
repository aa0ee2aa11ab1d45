"""The refit of a model: exact where it can be, never worse on tokens that it has not seen, and the same by hand."""

import copy
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.anatomy import CHANNELS, anatomy_of
from lightprune.compensation.refit import Compensation, Refitted
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, left_padded, random_plan, tiny_lm, tokens
from tests.training import weights

EVERY = [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe")]


def refit(
    lm: PreTrainedModel, plan: PruningPlan, batches: Sequence[Mapping[str, Tensor]], **settings: Any
) -> list[Refitted]:
    defaults: dict[str, Any] = {
        "everywhere": True,
        "held_out": 4,
        "total": lambda tensor: tensor,
        "edited": lambda parameter: nullcontext(parameter.detach()),
        "progress": lambda: None,
    }
    return Compensation(anatomy_of(lm), plan, batches, **(defaults | settings)).run()


def calibration(count: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(4, 12, seed)} for seed in range(count)]


def apart(lm: PreTrainedModel, dense: PreTrainedModel) -> float:
    """The mean square by which logits of tokens differ that nobody has fitted on."""
    batch = {"input_ids": tokens(8, 12, seed=999)}
    with torch.no_grad():
        return float((lm.eval()(**batch).logits - dense.eval()(**batch).logits).square().mean())


def test_a_cut_that_removes_nothing_changes_nothing() -> None:
    lm = tiny_lm()
    before = weights(lm)
    assert refit(lm, PruningPlan.of(anatomy_of(lm)), calibration(8)) == []
    for name, weight in weights(lm).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "olmo2"])
def test_what_is_there_twice_is_made_up_for_exactly(family: str) -> None:
    """Channels that are copies of others go: the columns of the others take their part, as the closed form finds."""
    lm = tiny_lm(family)
    anatomy = anatomy_of(lm)
    half = anatomy.shape.channels // 2
    with torch.no_grad():
        for site in anatomy.sites():
            if site.axes[0] == CHANNELS:
                for weight in site.weights():
                    dimension = weight.axes.index(CHANNELS)
                    rows = weight.parameter.unflatten(dimension, (2, half))
                    rows.select(dimension, 1).copy_(rows.select(dimension, 0))
    dense = copy.deepcopy(lm)
    plan = PruningPlan.of(anatomy, channels=[list(range(half))] * anatomy.num_layers)
    plain = copy.deepcopy(lm)
    cut_model(anatomy_of(plain), plan)
    done = refit(lm, plan, calibration(24))
    cut_model(anatomy_of(lm), plan)
    assert apart(lm, dense) < 0.02 * apart(plain, dense), done


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("structures", [("layers",), ("heads", "kv_groups", "channels"), ("layers", "channels")])
def test_every_family_gains_and_masked_is_cut(family: str, structures: tuple[str, ...]) -> None:
    lm = tiny_lm(family)
    anatomy = anatomy_of(lm)
    if not set(structures) <= set(anatomy.family.structures):
        pytest.skip(f"{family} cannot lose {structures}")
    try:
        plan = random_plan(anatomy, structures, random.Random(3))
    except Exception:
        pytest.skip(f"{family} cannot lose {structures} alone")
    dense, plain = copy.deepcopy(lm), copy.deepcopy(lm)
    cut_model(anatomy_of(plain), plan)
    before_cut = apart(plain, dense)
    done = refit(lm, plan, calibration(24))
    assert done
    assert all(one.after <= one.before for one in done)
    batch = left_padded()
    with torch.no_grad(), masked(anatomy, plan):
        expected = lm.eval()(**batch).logits
    cut_model(anatomy, plan)
    with torch.no_grad():
        torch.testing.assert_close(lm(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    assert apart(lm, dense) < before_cut


def test_in_front_of_a_removed_run_it_is_the_formula_itself() -> None:
    """Layers 2 and 3 go: the down projection of layer 1 takes, in closed form, what they would have added."""
    lm = tiny_lm("llama")
    anatomy = anatomy_of(lm)
    plan = PruningPlan.dropping(anatomy, [2, 3])
    batches = calibration(12)
    seen: list[Tensor] = []
    streams: dict[int, list[Tensor]] = {2: [], 4: []}
    layers = anatomy.layers
    handles = [layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))]
    for index in streams:
        handles.append(
            layers[index].register_forward_pre_hook(lambda m, i, index=index: streams[index].append(i[0].detach()))
        )
    with torch.no_grad():
        for batch in batches:
            lm.eval()(**batch)
    for handle in handles:
        handle.remove()
    x = torch.cat([one.flatten(0, 1) for one in seen[:8]]).double()
    e = torch.cat([(b - a).flatten(0, 1) for a, b in zip(streams[2][:8], streams[4][:8], strict=True)]).double()
    old = layers[1].mlp.down_proj.weight.detach().double().clone()

    # Attention's projection of the same layer is left as it is here, so that there is one regression alone.
    from lightprune.compensation import refit as module

    stock = module.projections_of

    def down_alone(*args: Any, **kwargs: Any) -> Any:
        steps = [[p for p in step if p.path == "mlp.down_proj"] for step in stock(*args, **kwargs)]
        return [step for step in steps if step]

    module.projections_of = down_alone
    try:
        (done,) = refit(lm, plan, batches, everywhere=False)
    finally:
        module.projections_of = stock
    assert done.path == "model.layers.1.mlp.down_proj"
    assert done.strength is not None
    ridge = done.strength * (x.T @ x).diagonal().mean()
    extended = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(x.shape[1], e.shape[1], dtype=torch.float64)
    change = torch.linalg.lstsq(extended, torch.cat([e, zeros])).solution
    torch.testing.assert_close(layers[1].mlp.down_proj.weight.detach().double(), old + change.T, rtol=1e-3, atol=1e-5)


def test_heads_are_made_up_for_where_attention_writes() -> None:
    """The first layer's output projection takes over from the heads that go, whatever its MLP then makes of it."""
    lm = tiny_lm("llama")
    anatomy = anatomy_of(lm)
    head_dim, kept = anatomy.shape.head_dim, [0, 2]
    plan = PruningPlan.of(anatomy, heads=[kept] * anatomy.num_layers)
    batches = calibration(12)
    seen: list[Tensor] = []
    projection = anatomy.layers[0].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches:
            lm.eval()(**batch)
    handle.remove()
    old = projection.weight.detach().double().clone()
    x = torch.cat([one.flatten(0, 1) for one in seen[:8]]).double()
    gone = torch.ones(x.shape[1], dtype=torch.bool)
    for head in kept:
        gone[head * head_dim : (head + 1) * head_dim] = False
    e = x[:, gone] @ old[:, gone].T
    x = x.masked_fill(gone, 0)
    (first, *_) = refit(lm, plan, batches, everywhere=False)
    assert first.path == "model.layers.0.self_attn.o_proj"
    assert first.strength is not None
    ridge = first.strength * (x.T @ x).diagonal().mean()
    extended = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(x.shape[1], e.shape[1], dtype=torch.float64)
    change = torch.linalg.lstsq(extended, torch.cat([e, zeros])).solution
    torch.testing.assert_close(projection.weight.detach().double(), old + change.T, rtol=1e-3, atol=1e-5)


def test_padding_weighs_nothing() -> None:
    """Tokens to fit on beside padding, and without it, give the same weights."""
    plan = PruningPlan.dropping(anatomy_of(tiny_lm("opt")), [2])
    whole, padded = tiny_lm("llama"), tiny_lm("llama")
    ids = [tokens(4, 12, seed) for seed in range(8)]
    plan = PruningPlan.dropping(anatomy_of(whole), [2, 3])
    refit(whole, plan, [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids])
    right = [torch.nn.functional.pad(one, (0, 3)) for one in ids]
    masks = [torch.nn.functional.pad(torch.ones_like(one), (0, 3)) for one in ids]
    refit(padded, plan, [{"input_ids": i, "attention_mask": m} for i, m in zip(right, masks, strict=True)])
    for name, weight in weights(padded).items():
        torch.testing.assert_close(weight, weights(whole)[name], rtol=1e-3, atol=1e-5)


def test_held_out_tokens_decide() -> None:
    """With two sequences to fit on, little generalises: what does not is left alone, and nothing gets worse."""
    lm = tiny_lm("llama")
    plan = PruningPlan.dropping(anatomy_of(lm), [1, 2])
    done = refit(lm, plan, [{"input_ids": tokens(1, 4, seed)} for seed in range(12)], held_out=10)
    assert all(one.after <= one.before for one in done)
