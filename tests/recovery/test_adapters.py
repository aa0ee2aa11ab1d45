"""Adapters on plain models and in plain optimizers; no Lightning."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from transformers import PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.recovery.adapters import Adapters, projections, restore, substitute
from tests.families import FAMILIES, left_padded, tiny_lm
from tests.training import assert_equal, weights


def adapted(lm: PreTrainedModel, paths: list[str] | None = None, **settings: Any) -> Adapters:
    anatomy = anatomy_of(lm)
    defaults: dict[str, Any] = {"r": 2, "alpha": 6, "dropout": 0.0, "use_rslora": False, "seed": 3}
    return Adapters(anatomy, paths or projections(anatomy), **(defaults | settings))


def lora(lm: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in lm.named_parameters() if "lora_" in name}


def draw(lm: PreTrainedModel) -> None:
    """Adapters that do something: B is 0 at first."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora(lm).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(lm: PreTrainedModel) -> Tensor:
    return lm.eval()(**left_padded(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_logits_of_every_family(family: str) -> None:
    lm = tiny_lm(family)
    names = [name for name, _ in lm.named_parameters()]
    plain = logits(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = adapted(lm)
    torch.testing.assert_close(logits(lm), plain, rtol=0, atol=0)
    draw(lm)
    expected = logits(lm)
    assert (expected - plain).abs().max() > 0.1
    adapters.merge()
    assert (logits(lm) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [name for name, _ in lm.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert not any(hasattr(module, "peft_config") for module in lm.modules())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_all_projections_are_those_that_the_anatomy_knows(family: str) -> None:
    """Qwen3-MoE apart: the anatomy knows nothing of the MLP of its dense layers."""
    anatomy = anatomy_of(tiny_lm(family))
    known = {site.path.split(".", anatomy.family.layers.count(".") + 2)[-1] for site in anatomy.sites()
             if site.layer is not None and len(site.axes) == 2}  # fmt: skip
    assert set(projections(anatomy)) == known


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 2), (True, 6 / 2**0.5)])
@pytest.mark.parametrize(("family", "path"), [("llama", "mlp.up_proj"), ("gpt2", "attn.c_attn")])
def test_merged_is_the_formula(family: str, path: str, use_rslora: bool, scale: float) -> None:
    lm = tiny_lm(family)
    layer = anatomy_of(lm).layers[4]
    weight = layer.get_submodule(path).weight
    before = weight.detach().clone()
    adapters = adapted(lm, [path], use_rslora=use_rslora)
    draw(lm)
    a, b = (p.detach().clone() for n, p in layer.named_parameters() if "lora_" in n)
    assert a.shape[0] == b.shape[1] == 2
    adapters.merge()
    product = torch.einsum("or,ri->oi", b, a)
    assert layer.get_submodule(path).weight is weight
    torch.testing.assert_close(weight, before + scale * (product.T if family == "gpt2" else product))


def test_the_same_adapters_whatever_was_drawn_before_and_nothing_drawn_after() -> None:
    found = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        lm = tiny_lm()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        adapted(lm, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append({name: p.detach().clone() for name, p in lora(lm).items()})
    assert_equal(found[0], found[1])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0] if "lora_A" in name)


@pytest.mark.parametrize(("weights", "adapter"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_weights_get_full_precision_adapters(weights: torch.dtype, adapter: torch.dtype) -> None:
    lm = tiny_lm().to(weights)
    layer = anatomy_of(lm).layers[1]
    before = layer.mlp.down_proj.weight.detach().clone()
    adapters = adapted(lm)
    draw(lm)
    a, b = (p.detach() for n, p in layer.named_parameters() if "down_proj.lora_" in n)
    assert a.dtype == b.dtype == adapter
    assert torch.isfinite(logits(lm)).all()
    adapters.merge()
    assert {parameter.dtype for parameter in lm.parameters()} == {weights}
    # Rounded once.
    assert torch.equal(layer.mlp.down_proj.weight, (before.to(adapter) + 3 * (b @ a)).to(weights))


def test_hidden_is_the_model_as_it_was() -> None:
    lm = tiny_lm("gpt2")
    lm.transformer.wte.weight.requires_grad_(False)
    before = [(name, parameter, parameter.requires_grad) for name, parameter in lm.named_parameters()]
    modules = [(name, module) for name, module in lm.named_modules()]
    lm.lm_head.weight.grad = torch.ones_like(lm.lm_head.weight)
    lm.transformer.ln_f.weight.grad = torch.ones_like(lm.transformer.ln_f.weight)
    adapters = adapted(lm)
    assert lm.transformer.ln_f.weight.grad is None  # its memory is free
    after = [(name, parameter, parameter.requires_grad) for name, parameter in lm.named_parameters()]
    assert {name for name, _, trained in after if trained} == lora(lm).keys()

    def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> bool:
        return len(found) == len(expected) and all(
            f[0] == e[0] and f[1] is e[1] and f[2:] == e[2:] for f, e in zip(found, expected, strict=True)
        )

    with adapters.hidden():
        assert same([(name, p, p.requires_grad) for name, p in lm.named_parameters()], before)
        assert same(list(lm.named_modules()), modules)
    assert same([(name, p, p.requires_grad) for name, p in lm.named_parameters()], after)
    draw(lm)
    unadapted = weights(tiny_lm("gpt2"))
    adapters.remove()
    assert all(not hasattr(module, "peft_config") for module in lm.modules())
    assert same([(name, p, p.requires_grad) for name, p in lm.named_parameters()], before)
    assert_equal(weights(lm), unadapted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_checkpoints(reentrant: bool) -> None:
    lm = tiny_lm()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hooks = len(lm.get_input_embeddings()._forward_hooks)
    adapters = adapted(lm)
    draw(lm)
    batch = left_padded()
    lm.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    plain = tiny_lm()
    adapted(plain)
    draw(plain)
    plain(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for name, parameter in lora(plain).items():
        torch.testing.assert_close(lora(lm)[name].grad, parameter.grad)
    adapters.merge()
    assert len(lm.get_input_embeddings()._forward_hooks) == hooks


def test_places_in_optimizers_are_given_and_taken_back() -> None:
    w = [nn.Parameter(torch.full((2,), float(i))) for i in range(5)]
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    first = SGD([{"params": w[:2], "lr": 0.1}, {"params": [w[2]], "lr": 0.2}], momentum=0.9)
    second = Adam([w[3]], lr=0.3)
    for parameter in w:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.step()
    kept = first.state[w[1]]["momentum_buffer"]

    # w[4] is trained by nobody.
    before = substitute([first, second], {w[0]: (a, b), w[2]: (), w[3]: (), w[4]: (c,)})

    def ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]

    assert ids(first) == [[id(a), id(b), id(w[1]), id(c)], []]
    assert ids(second) == [[]]
    assert [group["lr"] for group in first.param_groups] == [0.1, 0.2]
    assert set(first.state) == {w[1]}
    assert first.state[w[1]]["momentum_buffer"] is kept
    assert not second.state
    for parameter in (a, b, c):
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.step()
    assert [p.item() for p in (a, b, c)] == pytest.approx([-0.1] * 3)

    restore([first, second], before)
    assert ids(first) == [[id(w[0]), id(w[1])], [id(w[2])]]
    assert ids(second) == [[id(w[3])]]
    assert set(first.state) == {w[1]}
    assert not second.state
