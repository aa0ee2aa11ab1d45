"""What no stock class holds, or computes, is refused before training; what only looks different is not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.export.stock_check import check_stock
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, tiny_lm


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes_and_notices_nothing(name: str, dtype: torch.dtype) -> None:
    """`bf16-true` rounds buffers too."""
    lm = tiny_lm(name, num_layers=3).to(dtype)
    lm.model_hooks = [lm.register_forward_hook(lambda *_: None)]  # type: ignore[attr-defined]
    lm.get_decoder().eval()
    before = snapshot(lm)

    check_stock(lm)

    assert snapshot(lm) == before


def snapshot(lm: PreTrainedModel) -> dict[str, Any]:
    """All that a check might leave behind."""
    return {
        "config": copy.deepcopy(lm.config.to_dict()),
        "tensors": {n: (id(t), t.tolist()) for n, t in (*lm.named_parameters(), *lm.named_buffers())},
        "modes": [module.training for module in lm.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.modules()],
        "gradients": [parameter.grad for parameter in lm.parameters()],
        "random": torch.get_rng_state().tolist(),
    }


def test_a_gemma_that_was_cut_keeps_its_scale() -> None:
    """As where a run goes on after the cut."""
    lm = tiny_lm("gemma2", num_layers=3)
    cut_model(anatomy_of(lm), PruningPlan.keeping(anatomy_of(lm), hidden=range(24)))
    check_stock(lm)


class Counting(LlamaForCausalLM):
    """Counts calls in a buffer that is not saved, and computes what a Llama does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_a_forward_of_its_own_that_computes_the_same_passes() -> None:
    lm = Counting(tiny_lm("llama", num_layers=2).config)
    check_stock(lm)
    assert lm.calls == 0


def test_other_kernels_pass() -> None:
    """As those of Liger: the same function in other steps."""

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.double()
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (self.weight.double() * normed).to(x.dtype)

    lm = tiny_lm("llama", num_layers=4)
    for module in lm.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = forward.__get__(module)
    check_stock(lm)


@pytest.mark.parametrize(
    "fields",
    [
        {"output_router_logits": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_what_forward_returns_beside_logits_does_not_matter(name: str, fields: dict[str, Any]) -> None:
    lm = tiny_lm(name, num_layers=2, **fields)
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    check_stock(lm)
    assert all(getattr(lm.config, field) == value for field, value in fields.items())


def test_weights_of_two_dtypes_and_dropout_pass() -> None:
    lm = tiny_lm("llama", num_layers=2, attention_dropout=0.5).to(torch.bfloat16)
    lm.lm_head.float()
    check_stock(lm)
    assert lm.lm_head.weight.dtype == torch.float32


def add_buffer(lm: PreTrainedModel) -> None:
    lm.register_buffer("tokens_seen", torch.zeros(1))


def add_extra_state(lm: PreTrainedModel) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"scale": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    lm.model.layers[0].mlp.up_proj.__class__ = Stateful


def add_parameter(lm: PreTrainedModel) -> None:
    lm.model.register_parameter("scale", nn.Parameter(torch.ones(())))


def scale_logits(lm: PreTrainedModel) -> None:
    lm.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.9)


def scale_a_layer(lm: PreTrainedModel) -> None:
    lm.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.1)


def change_an_attribute(lm: PreTrainedModel) -> None:
    lm.model.layers[0].self_attn.scaling = 0.1


def stretch_positions(lm: PreTrainedModel) -> None:
    """By hand, in a buffer that is computed anew when the model is loaded."""
    lm.model.rotary_emb.inv_freq.mul_(0.5)


def need_labels(lm: PreTrainedModel) -> None:
    forward = lm.forward

    def own(input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return forward(input_ids, labels=labels, **kwargs)

    lm.forward = own


def break_a_weight(lm: PreTrainedModel) -> None:
    lm.model.layers[1].mlp.up_proj.weight.data[3, :5] = torch.nan


def overflow(lm: PreTrainedModel) -> None:
    lm.half()
    lm.model.layers[1].mlp.up_proj.weight.data.fill_(6e4)


OTHERWISE = r"computes something else \(logits by .* of its own, a hook or a changed attribute would be lost"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (add_buffer, "tokens_seen, a buffer that is saved, .*`persistent=False`"),
        (add_extra_state, "model.layers.0.mlp.up_proj._extra_state, an extra state"),
        (add_parameter, r"1 parameters would not be those of a stock LlamaForCausalLM .*model.scale: \[\]"),
        (scale_logits, OTHERWISE),
        (scale_a_layer, OTHERWISE),
        (change_an_attribute, OTHERWISE),
        (stretch_positions, OTHERWISE),
        (need_labels, "fails on plain tokens, where a stock LlamaForCausalLM with its weights does not .*labels"),
        (break_a_weight, r"is broken: 1 of 66 weights .*layers.1.mlp.up_proj.weight: 5 of 1,536"),
        (overflow, "logits are not finite in torch.float16"),
    ],
)
def test_what_no_stock_class_can_hold(change: Callable[[PreTrainedModel], None], sentence: str) -> None:
    lm = tiny_lm(num_layers=4)
    change(lm)
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_stock(lm)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert lm.training
