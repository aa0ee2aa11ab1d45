"""What users hold in their modules and trainers beside the LM: allowed where no cut breaks it, else refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightprune import (
    BlockInfluenceSelector,
    ConfigError,
    ExportHF,
    MagnitudeUnitSelector,
    RandomSelector,
    StructuredCut,
)
from lightprune.integrations.lightning import find_causal_lm
from tests.families import tiny_lm
from tests.training import Batch, Plain, batches, fit


class Beside(Plain):
    """A module with something beside the LM."""

    pruned_model = "lm"

    def __init__(self, beside: Callable[[Any], Any]) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.lm)
        with torch.no_grad():
            self.teacher.model.norm.weight += 1
            for layer in self.teacher.model.layers:
                layer.input_layernorm.weight += 1
        self.beside = beside(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.lm.parameters(), lr=0.05)


class NoStep(Beside):
    """Fails the test if training begins."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("training began")


def depth(at: int = 1) -> list[Callback]:
    return [RandomSelector(drop=2), StructuredCut(at=at, validate=False)]


def width(at: int = 1) -> list[Callback]:
    return [MagnitudeUnitSelector(channels=32), StructuredCut(at=at, validate=False)]


def sentence(module: L.LightningModule, parts: list[Callback], **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        fit(module, parts, batches(2), 2, **kwargs)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    return str(error.value)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_forward(module: Any) -> None:
    module.lm.forward = torch.compile(module.lm.forward, backend="eager")


# Compiled code.


@pytest.mark.parametrize("other", [lambda m: compiled(nn.Linear(2, 2)), lambda m: compiled(m.teacher)])
def test_a_compiled_bystander_is_left_alone(other: Callable[[Any], Any]) -> None:
    fit(Beside(other), depth(), batches(2), 2)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda m: compiled(m.lm.model), "beside"),
        (lambda m: m.lm.model.layers[1].mlp.compile(backend="eager"), "lm.model.layers.1.mlp"),
        (lambda m: compiled(nn.ModuleDict({"lm": m.lm})), "beside"),
        (compiled_forward, "lm"),
    ],
    ids=["the decoder", "in place, a part", "what holds it", "its forward"],
)
def test_compiled_parts_of_the_lm_are_refused(other: Callable[[Any], Any], name: str) -> None:
    assert sentence(NoStep(other), depth()).startswith(f"{name} is compiled")


# Averages.


def smaller_teacher(module: Any) -> nn.Module:
    return AveragedModel(tiny_lm(num_layers=2))


@pytest.mark.parametrize("parts", [depth, width])
@pytest.mark.parametrize("other", [lambda m: AveragedModel(m.teacher), smaller_teacher], ids=["as large", "smaller"])
def test_an_average_of_a_teacher_is_left_alone(other: Any, parts: Any) -> None:
    fit(Beside(other), parts(), batches(2), 2)


@pytest.mark.parametrize("parts", [depth, width])
@pytest.mark.parametrize("of", [lambda m: m.lm, lambda m: m.lm.model, lambda m: nn.ModuleDict({"lm": m.lm})])
def test_an_average_of_the_lm_is_refused(of: Any, parts: Any) -> None:
    assert "beside is an AveragedModel" in sentence(NoStep(lambda m: AveragedModel(of(m))), parts())


# Checkpoints.


@pytest.mark.parametrize("weights_only_first", [True, False])
def test_weights_alone_beside_a_whole_checkpoint(weights_only_first: bool, tmp_path: Any) -> None:
    savers = [
        ModelCheckpoint(tmp_path / "weights", save_weights_only=True, every_n_train_steps=1),
        ModelCheckpoint(tmp_path / "whole", every_n_train_steps=2),
    ]
    fit(Plain(), [*depth(), *savers[:: 1 if weights_only_first else -1]], batches(2), 2, enable_checkpointing=True)
    saved = torch.load(next((tmp_path / "weights").iterdir()), weights_only=True)["state_dict"]
    assert len({name.split(".")[3] for name in saved if ".layers." in name}) == 4


# Lightning's ModelPruning.


def masks() -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_masks_beside_a_cut_of_layers(at: int, last: bool, tmp_path: Any) -> None:
    """What is exported has zeros and no masks, whoever comes first in the trainer's list."""
    parts = [*depth(at), ExportHF(str(tmp_path / "out"))]
    module = Plain()
    fit(module, [*parts, masks()] if last else [masks(), *parts], batches(2), -1, max_epochs=2)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(exported.model.layers) == 4
    assert (exported.model.layers[1].mlp.up_proj.weight == 0).float().mean() > 0.2


def test_masks_beside_a_cut_in_width_are_refused() -> None:
    said = sentence(NoStep(lambda m: None), [*width(), masks()])
    assert said.startswith("ModelPruning puts masks of the uncut sizes")
    assert "a cut of channels" in said


# Adapters.


def test_a_model_that_has_adapters_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft")

    class Adapted(Plain):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
            if wrap:
                self.lm = peft.get_peft_model(self.lm, config)
            else:
                self.lm.add_adapter(config)

    class Prompted(Plain):
        def __init__(self) -> None:
            super().__init__()
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            self.lm = peft.get_peft_model(self.lm, config)

    for module in (Adapted(wrap=True), Adapted(wrap=False), Prompted()):
        for parts in (depth(), width(), [BlockInfluenceSelector(drop=1)]):
            said = sentence(module, parts)
            assert said.startswith("The LM has PEFT adapters")
            assert "merge the adapters first" in said
            assert "LoRARecovery" in said


def test_a_model_whose_adapters_were_merged_is_cut() -> None:
    peft = pytest.importorskip("peft")
    module = Plain()
    adapted = peft.get_peft_model(module.lm, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    module.lm = adapted.merge_and_unload().requires_grad_(True)
    fit(module, depth(), batches(2), 2)
    assert len(module.lm.model.layers) == 4


# Which model is meant.


class Holds(L.LightningModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize("make", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_a_language_models_head(make: Any) -> None:
    module = Holds(encoder=make.from_config(tiny_lm().config), head=nn.Linear(32, 2))
    with pytest.raises(
        ConfigError, match=r"only a Llama\w+ without a .* head at 'encoder': load it as `AutoModelForCausal"
    ):
        find_causal_lm(module)


def test_the_decoder_of_a_causal_lm_under_a_head_of_ones_own_is_cut() -> None:
    """What the sentence advises."""

    class Classifier(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 2)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            hidden = self.lm.base_model(batch["input_ids"], use_cache=False).last_hidden_state
            return self.head(hidden[:, -1]).logsumexp(-1).mean()

    module = Classifier()
    fit(module, [BlockInfluenceSelector(drop=2, stop=1), StructuredCut(at=1, validate=False)], batches(2), 2)
    assert len(module.lm.model.layers) == 4


@pytest.mark.parametrize("named", ["lm", "alias"])
def test_the_model_to_prune_may_have_two_names(named: str) -> None:
    lm = tiny_lm(num_layers=2)
    module = Holds(lm=lm, alias=lm, teacher=tiny_lm(num_layers=2))
    module.pruned_model = named  # type: ignore[assignment]
    assert find_causal_lm(module) == (named, lm)


def test_a_wrong_name_of_the_only_model() -> None:
    module = Holds(lm=tiny_lm(num_layers=2))
    module.pruned_model = "model"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^Holds\.pruned_model is 'model', and there is no .*: set it to lm\.$"):
        find_causal_lm(module)


def test_the_other_package_of_lightning() -> None:
    other = pytest.importorskip("pytorch_lightning")
    trainer = other.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    from lightprune.strategies import adapter_of

    with pytest.raises(ConfigError, match=r"of the package pytorch_lightning: .*lightning\.pytorch"):
        adapter_of(trainer)
