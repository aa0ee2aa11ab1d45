"""Coupled groups: against slices written out by hand, and against what a cut really takes away."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.anatomy import Unit, anatomy_of
from lightprune.importance.groups import Norm, coupled, unit_norms, unit_ranges
from lightprune.plan import PruningPlan
from lightprune.surgery import resulting_parameters
from tests.families import FAMILIES, tiny_lm

LAYER = 1
Slices = Callable[[PreTrainedModel, int], list[Tensor]]


def llama_channel(lm: PreTrainedModel, j: int) -> list[Tensor]:
    mlp = lm.model.layers[LAYER].mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return [gate.weight[j], gate.bias[j], up.weight[j], up.bias[j], down.weight[:, j]]


def llama_head(lm: PreTrainedModel, h: int) -> list[Tensor]:
    """Heads of 8 dimensions; two share a key-value head, which stays when one of them goes."""
    attention, own = lm.model.layers[LAYER].self_attn, slice(8 * h, 8 * h + 8)
    return [attention.q_proj.weight[own], attention.q_proj.bias[own], attention.o_proj.weight[:, own]]


def llama_group(lm: PreTrainedModel, g: int) -> list[Tensor]:
    attention, own = lm.model.layers[LAYER].self_attn, slice(8 * g, 8 * g + 8)
    keys_values = [p[own] for p in (*attention.k_proj.parameters(), *attention.v_proj.parameters())]
    return [*llama_head(lm, 2 * g), *llama_head(lm, 2 * g + 1), *keys_values]


def llama_hidden(lm: PreTrainedModel, d: int) -> list[Tensor]:
    """With tied embeddings: the head's weight is the embedding's."""
    found = [lm.model.embed_tokens.weight[:, d], lm.model.norm.weight[d]]
    for layer in lm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        found += [reader.weight[:, d] for reader in readers]
        found += [p[d] for writer in (attention.o_proj, mlp.down_proj) for p in writer.parameters()]
        found += [layer.input_layernorm.weight[d], layer.post_attention_layernorm.weight[d]]
    return found


def phi3_channel(lm: PreTrainedModel, j: int) -> list[Tensor]:
    mlp = lm.model.layers[LAYER].mlp
    return [mlp.gate_up_proj.weight[j], mlp.gate_up_proj.weight[48 + j], mlp.down_proj.weight[:, j]]


def phi3_group(lm: PreTrainedModel, g: int) -> list[Tensor]:
    """Rows: four heads of q, two of k, two of v, eight dimensions each."""
    attention = lm.model.layers[LAYER].self_attn
    fused = attention.qkv_proj.weight
    queries, keys, values = fused[:32].split(16)[g], fused[32:48].split(8)[g], fused[48:].split(8)[g]
    return [queries, keys, values, attention.o_proj.weight[:, 16 * g : 16 * g + 16]]


def gpt2_channel(lm: PreTrainedModel, j: int) -> list[Tensor]:
    mlp = lm.transformer.h[LAYER].mlp
    return [mlp.c_fc.weight[:, j], mlp.c_fc.bias[j], mlp.c_proj.weight[j]]


def gpt2_head(lm: PreTrainedModel, h: int) -> list[Tensor]:
    """A head that is a group of its own takes its keys and values along."""
    attention, own = lm.transformer.h[LAYER].attn, slice(8 * h, 8 * h + 8)
    weights = [third[:, own] for third in attention.c_attn.weight.split(32, dim=1)]
    biases = [third[own] for third in attention.c_attn.bias.split(32)]
    return [*weights, *biases, attention.c_proj.weight[own]]


def neox_head(lm: PreTrainedModel, h: int) -> list[Tensor]:
    attention = lm.gpt_neox.layers[LAYER].attention
    fused, own = attention.query_key_value, slice(24 * h, 24 * h + 24)
    return [fused.weight[own], fused.bias[own], attention.dense.weight[:, 8 * h : 8 * h + 8]]


CASES: list[tuple[str, Unit, int, Slices]] = [
    ("llama_tied", "channels", 48, llama_channel),
    ("llama_tied", "heads", 4, llama_head),
    ("llama_tied", "kv_groups", 2, llama_group),
    ("llama_tied", "hidden", 32, llama_hidden),
    ("phi3", "channels", 48, phi3_channel),
    ("phi3", "kv_groups", 2, phi3_group),
    ("gpt2", "channels", 48, gpt2_channel),
    ("gpt2", "heads", 4, gpt2_head),
    ("gpt2", "kv_groups", 4, gpt2_head),
    ("gpt_neox", "heads", 4, neox_head),
    ("gpt_neox", "kv_groups", 4, neox_head),
]


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("name", "unit", "count", "slices"), CASES)
def test_norms_and_their_gradients_are_those_of_the_slices(
    name: str, unit: Unit, count: int, slices: Slices, norm: Norm
) -> None:
    lm = tiny_lm(name)
    factors = torch.linspace(1, 2, count)

    def by_hand() -> Tensor:
        flat = [torch.cat([s.flatten() for s in slices(lm, index)]) for index in range(count)]
        return torch.stack([w.abs().mean() if norm == "l1" else w.square().mean().sqrt() for w in flat])

    def gradients(norms: Tensor) -> list[Tensor | None]:
        lm.zero_grad()
        (norms * factors).sum().backward()
        return [p.grad for p in lm.parameters()]

    found = unit_norms(anatomy_of(lm), unit, None if unit == "hidden" else LAYER, norm)
    torch.testing.assert_close(found, by_hand())
    torch.testing.assert_close(gradients(found), gradients(by_hand()))


@pytest.mark.parametrize("unit", ["heads", "kv_groups", "channels", "hidden"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_group_has_as_many_weights_as_the_model_loses_with_its_unit(name: str, unit: Unit) -> None:
    lm = tiny_lm(name, num_layers=2)
    anatomy = anatomy_of(lm)
    if unit not in anatomy.family.structures | {"kv_groups"}:
        pytest.skip(f"{name} has no {unit} to prune")
    shape = anatomy.shape
    heads, channels, per_group = range(shape.heads), range(shape.channels), shape.heads_per_group
    plan = {  # in both layers one unit goes; a lone query head's key-value group stays, where it has others
        "heads": lambda: PruningPlan.of(anatomy, heads=[heads[1:], heads[1:]]),
        "kv_groups": lambda: PruningPlan.of(anatomy, heads=[heads[per_group:], heads[per_group:]]),
        "channels": lambda: PruningPlan.of(anatomy, channels=[channels[1:], channels[1:]]),
        "hidden": lambda: PruningPlan.of(anatomy, hidden=range(1, shape.hidden)),
    }[unit]()
    lost = anatomy.num_parameters - resulting_parameters(anatomy, plan)
    layers = [None] if unit == "hidden" else [0, 1]
    groups = [coupled(anatomy, unit, layer) for layer in layers]
    assert sum(group.size for places in groups for group in places) == lost
    assert {group.count for places in groups for group in places} == {shape.count(unit)}


def test_units_are_a_view_that_can_be_scaled_in_place() -> None:
    lm = tiny_lm("phi3")
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    factors = torch.ones(48)
    factors[[3, 40]] = 0
    for group in coupled(anatomy_of(lm), "channels", LAYER):
        rows = group.units(group.weight.parameter.data)
        rows.mul_(factors.view(-1, *[1] * (rows.ndim - 1)))
    mlp, prefix = lm.model.layers[LAYER].mlp, f"model.layers.{LAYER}.mlp."
    expected = before[prefix + "gate_up_proj.weight"]
    expected[[3, 40, 48 + 3, 48 + 40]] = 0
    before[prefix + "down_proj.weight"][:, [3, 40]] = 0
    assert torch.equal(mlp.gate_up_proj.weight, expected)
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_group_of_zeros_has_norm_and_gradient_zero() -> None:
    lm = tiny_lm("llama_tied")
    with torch.no_grad():
        for slice_ in llama_channel(lm, 5):
            slice_.zero_()
    norms = unit_norms(anatomy_of(lm), "channels", LAYER, "l2")
    norms.sum().backward()
    assert norms[5] == 0
    assert (norms[[4, 6]] > 0).all()
    mlp = lm.model.layers[LAYER].mlp
    assert not mlp.gate_proj.weight.grad[5].any()
    assert not mlp.down_proj.weight.grad[:, 5].any()
    assert all(parameter.grad.isfinite().all() for parameter in mlp.parameters() if parameter.grad is not None)


def test_half_precision_weights_are_summed_in_float32() -> None:
    lm = tiny_lm("llama_tied")
    whole = unit_norms(anatomy_of(lm.bfloat16().float()), "hidden", None, "l2")
    half = unit_norms(anatomy_of(lm.bfloat16()), "hidden", None, "l2")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole)


def test_large_weights_are_taken_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = anatomy_of(tiny_lm("llama_tied"))
    whole = {unit: unit_norms(anatomy, unit, None if unit == "hidden" else 0, "l2") for unit in ("hidden", "kv_groups")}
    monkeypatch.setattr("lightprune.importance.groups._SLICE", 100)
    for unit, norms in whole.items():
        torch.testing.assert_close(unit_norms(anatomy, unit, None if unit == "hidden" else 0, "l2"), norms)


@pytest.mark.parametrize(("name", "unit", "count", "slices"), [case for case in CASES if case[3] is not llama_group])
def test_ranges_are_those_of_the_matrices(name: str, unit: Unit, count: int, slices: Slices) -> None:
    lm = tiny_lm(name)
    of_units = []
    for index in range(count):
        found = [part.detach() for part in slices(lm, index)]
        matrices = [part for part in found if part.ndim == max(other.ndim for other in found)]
        of_units.append([float(part.max()) - float(part.min()) for part in matrices])
    expected = [
        sum(r / max(column) for r, column in zip(one, zip(*of_units, strict=True), strict=True)) for one in of_units
    ]
    layer = None if unit == "hidden" else LAYER
    torch.testing.assert_close(unit_ranges(anatomy_of(lm), unit, layer), torch.tensor(expected))
