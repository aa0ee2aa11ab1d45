"""Models with packed weights: layers can be cut, and what would have to slice or change the weights is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightprune import (
    ActivationUnitSelector,
    BlockInfluenceSelector,
    ConfigError,
    ExportHF,
    HardConcreteSelector,
    LayerGateSelector,
    LoRARecovery,
    MagnitudeUnitSelector,
    RandomSelector,
    RandomUnitSelector,
    StructuredCut,
    TaylorUnitSelector,
)
from tests.families import tiny_lm
from tests.logits import assert_same, logits_of
from tests.training import Batch, Plain, batches, fit, trainer_for


class Packed(nn.Parameter):
    """Two 4-bit numbers in a byte [out, in / 2], as every library packs them in one way or another."""


class PackedLinear(nn.Linear):
    """A projection with a packed weight, one scale for each output, and a float bias."""

    weight: Any

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.bias = plain.bias
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (plain.weight.detach() / scale).round().to(torch.int8) + 8
        self.weight = Packed((levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        packed = self.weight.to(torch.int16)
        levels = torch.stack([packed // 16, packed % 16], dim=-1).flatten(1) - 8
        return nn.functional.linear(input, levels * self.scale, self.bias)


def packed_by_hand(folder: Path) -> PreTrainedModel:
    lm = tiny_lm()
    for layer in lm.model.layers:
        for path, module in [*layer.named_modules()]:
            if isinstance(module, nn.Linear):
                layer.set_submodule(path, PackedLinear(module))
    return lm


def by_bitsandbytes(bits: int) -> Callable[[Path], PreTrainedModel]:
    def load(folder: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        if not (folder / "plain").exists():
            tiny_lm("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder / "plain")
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        lm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder / "plain", quantization_config=config, device_map="cpu"
        )
        return lm.train()

    return load


MODELS = {"packed by hand": packed_by_hand, "4 bit": by_bitsandbytes(4), "8 bit": by_bitsandbytes(8)}
models = pytest.mark.parametrize("load", MODELS.values(), ids=MODELS)


class Quantized(Plain):
    """Trains what is not packed, at a rate of zero, so that the model stays comparable."""

    strict_loading = False  # the state dict of bitsandbytes has more than it loads

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


class NoStep(Quantized):
    """Fails the test if training begins."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("training began")


@models
@pytest.mark.parametrize(
    "selector",
    [
        lambda: BlockInfluenceSelector(drop=2, stop=2),
        lambda: LayerGateSelector(drop=2, rounds=1, steps_per_round=2),
        lambda: RandomSelector(drop=2),
    ],
    ids=["block influence", "gates", "random"],
)
def test_layers_are_cut_and_the_rest_stays_as_it_is_packed(load: Any, selector: Any, tmp_path: Path) -> None:
    """Cut equals left out, and a run that is broken off after the cut goes on."""
    lm = load(tmp_path)
    left_out = copy.deepcopy(lm)
    parts: list[Callback] = [selector(), StructuredCut(at=2, validate=False)]
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Quantized(lm), [*parts, saver], batches(4), 4, enable_checkpointing=True)
    for index in parts[0].plan.dropped_layers:  # type: ignore[attr-defined]
        left_out.model.layers[index] = Nothing()
    assert len(lm.model.layers) == 4
    packed = {type(layer.self_attn.q_proj.weight) for layer in lm.model.layers}
    assert packed == {type(load(tmp_path).model.layers[0].self_attn.q_proj.weight)}
    assert_same(logits_of(lm, batches(1)[0]), logits_of(left_out, batches(1)[0]))
    again = Quantized(load(tmp_path))
    resumed = trainer_for([selector(), StructuredCut(at=2, validate=False)], 4)
    resumed.fit(again, batches(4), ckpt_path=tmp_path / "step=3.ckpt", weights_only=False)
    assert resumed.global_step == 4
    assert_same(logits_of(again.lm, batches(1)[0]), logits_of(lm, batches(1)[0]))


class Nothing(nn.Module):
    """Hands on what it gets."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("load", [MODELS["4 bit"], MODELS["8 bit"]], ids=["4 bit", "8 bit"])
def test_what_is_left_is_exported_quantized(load: Any, tmp_path: Path) -> None:
    lm = load(tmp_path)
    parts = [BlockInfluenceSelector(drop=2, stop=2), StructuredCut(at=2, validate=False)]
    fit(Quantized(lm), [*parts, ExportHF(str(tmp_path / "out"))], batches(3), 3)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(exported.model.layers) == 4
    assert_same(logits_of(exported, batches(1)[0]), logits_of(lm.eval(), batches(1)[0]))


@models
@pytest.mark.parametrize(
    "selector",
    [
        lambda: MagnitudeUnitSelector(channels=32),
        lambda: TaylorUnitSelector(channels=32, stop=1),
        lambda: ActivationUnitSelector(kv_groups=1, stop=1),
        lambda: RandomUnitSelector(hidden=24),
        lambda: HardConcreteSelector(channels=32, stop=1),
    ],
    ids=["magnitude", "taylor", "activation", "random", "masks"],
)
def test_widths_are_refused(load: Any, selector: Any, tmp_path: Path) -> None:
    parts = [selector(), StructuredCut(at=1, validate=False)]
    with pytest.raises(
        ConfigError, match=r"^The LM's model\.layers\.0\.\w+\.\w+ is quantized .*torch\.u?int8"
    ) as error:
        fit(NoStep(load(tmp_path)), parts, batches(2), 2)
    assert "cut layers only." in str(error.value)


@models
def test_masks_that_would_be_written_into_packed_weights_are_refused(load: Any, tmp_path: Path) -> None:
    parts = [HardConcreteSelector(layers=4, stop=1), StructuredCut(at=1, validate=False)]
    with pytest.raises(ConfigError, match=r"^HardConcreteSelector writes what it learns .* layer 0 are quantized"):
        fit(NoStep(load(tmp_path)), parts, batches(2), 2)


@models
def test_adapters_that_would_be_merged_into_packed_weights_are_refused(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    parts = [BlockInfluenceSelector(drop=2, stop=1), StructuredCut(at=1, validate=False), LoRARecovery(r=2)]
    with pytest.raises(ConfigError, match=r"^LoRARecovery\.target_modules has self_attn\.q_proj, which is quantized"):
        fit(NoStep(load(tmp_path)), parts, batches(2), 2)


def test_projections_without_any_parameter_are_packed_too() -> None:
    """As those of libraries that keep their weights in buffers."""
    lm = tiny_lm()
    for layer in lm.model.layers:
        layer.mlp = torch.ao.quantization.quantize_dynamic(layer.mlp, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConfigError, match=r"^The LM's model\.layers\.0\.mlp\.\w+ is quantized \(it has Linear\)"):
        fit(NoStep(lm), [MagnitudeUnitSelector(channels=32), StructuredCut(at=1)], batches(2), 2)
