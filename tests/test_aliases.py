"""Parts of the LM under a second name in the user's module: kept up to date by the cut, or refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightprune import (
    BlockInfluenceSelector,
    ConfigError,
    LoRARecovery,
    MagnitudeUnitSelector,
    PlanFromFile,
    PruningPlan,
    RandomSelector,
    RandomUnitSelector,
    StructuredCut,
)
from lightprune.anatomy import anatomy_of
from tests.families import tiny_lm
from tests.training import Batch, Plain, assert_equal, batches, fit, trainer_for, weights


class Named(Plain):
    """A module in which something of the LM has another name."""

    pruned_model = "lm"

    def __init__(self, name: Callable[[Any], Any]) -> None:
        super().__init__()
        self.other = name(self.lm)


class NoStep(Named):
    """Fails the test if training begins."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("training began")


class Reader(nn.Module):
    """A network of the user's own around parts of the LM."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.out = nn.Linear(32, 1)


def teacher(lm: Any, path: str) -> Any:
    """A copy of the LM that shares one of its modules."""
    other = copy.deepcopy(lm)
    other.set_submodule(path, lm.get_submodule(path))
    return other


def depth() -> list[Callback]:
    return [BlockInfluenceSelector(drop=2, stop=2, protect_first=1), StructuredCut(at=2, validate=False)]


def hidden() -> list[Callback]:
    return [MagnitudeUnitSelector(hidden=24), StructuredCut(at=2, validate=False)]


def channels() -> list[Callback]:
    return [MagnitudeUnitSelector(channels=32), StructuredCut(at=2, validate=False)]


REFUSED: dict[str, tuple[Callable[[Any], Any], Callable[[], list[Callback]], str]] = {
    "a copy of the list": (lambda lm: nn.ModuleList(lm.model.layers), depth, r"^other\.1 is the LM's model\.layers\.1"),
    "some layers": (lambda lm: lm.model.layers[3:], depth, r"^other\.0 is the LM's model\.layers\.3, which would stay"),
    "one layer": (lambda lm: lm.model.layers[-1], depth, r"^other is the LM's model\.layers\.5.*`model\.layers`"),
    "a plain list": (lambda lm: [*lm.model.layers], depth, r"^other\[1\] is the LM's model\.layers\.1"),
    "a dictionary of tuples": (
        lambda lm: {"last": ("x", lm.model.layers[5])}, depth, r"^other\['last'\]\[1\] is the LM's model\.layers\.5",
    ),
    "a part of a layer": (lambda lm: lm.model.layers[2].mlp, depth, r"^other is the LM's model\.layers\.2\.mlp"),
    "a parameter of a layer": (
        lambda lm: lm.model.layers[2].mlp.up_proj.weight, depth, r"^other is the LM's model\.layers\.2\.mlp\.up_proj",
    ),
    "a layer in the LM itself": (
        lambda lm: lm.model.add_module("first", lm.model.layers[2]), depth, r"^model\.first is the LM's model\.layers",
    ),
    "a teacher's layer": (
        lambda lm: teacher(lm, "model.layers.3"), depth,
        r"^other\.model\.layers\.3 is the LM's model\.layers\.3, so a cut of layers would change other too: .*copy",
    ),
    "a teacher's list": (
        lambda lm: teacher(lm, "model.layers"), depth, r"^other\.model\.layers is the LM's model\.layers, so a cut",
    ),
    "a teacher's embedding": (
        lambda lm: teacher(lm, "model.embed_tokens"), hidden,
        r"^other\.model\.embed_tokens is .* smaller while the rest of other keeps its size: .*deepcopy",
    ),
    "a hidden teacher's embedding": (
        lambda lm: [teacher(lm, "model.embed_tokens")], hidden, r"^other\[0\]\.model\.embed_tokens is the LM's",
    ),
    "a teacher's norm": (lambda lm: teacher(lm, "model.norm"), hidden, r"^other\.model\.norm is the LM's model\.norm"),
    "a teacher's MLP": (lambda lm: teacher(lm, "model.layers.0.mlp"), channels, r"^other\.model\.layers\.0\.mlp is"),
    "a norm in a head": (lambda lm: Reader(norm=lm.model.norm), hidden, r"^other\.norm is the LM's model\.norm"),
    "a parameter": (lambda lm: lm.model.norm.weight, hidden, r"^other is the LM's model\.norm\.weight, .* smaller"),
    "all parameters": (lambda lm: [*lm.parameters()], channels, r"^other\[\d+\] is the LM's model\.layers\.0.*smaller"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cut_would_leave_behind_is_refused_by_name(case: str) -> None:
    name, parts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        fit(NoStep(name), parts(), batches(3), 3)
    assert str(error.value).endswith(".")
    assert ". " not in str(error.value)


GOOD: dict[str, tuple[Callable[[Any], Any], Callable[[], list[Callback]]]] = {
    "the list": (lambda lm: lm.model.layers, depth),
    "the list in a plain list": (lambda lm: [lm.model.layers], depth),
    "the decoder": (lambda lm: lm.model, depth),
    "the list in a network": (lambda lm: Reader(blocks=lm.model.layers), depth),
    "a protected layer": (lambda lm: lm.model.layers[0], depth),
    "a teacher that shares the embedding": (lambda lm: teacher(lm, "model.embed_tokens"), depth),
    "a plain list of parameters": (lambda lm: [*lm.parameters()], depth),
    "the embedding": (lambda lm: lm.get_input_embeddings(), hidden),
    "the list, in width": (lambda lm: lm.model.layers, hidden),
    "one layer, in width": (lambda lm: lm.model.layers[2], hidden),
    "a teacher that shares the norm": (lambda lm: teacher(lm, "model.norm"), channels),
    "the LM": (lambda lm: lm, hidden),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_the_cut_keeps_up_to_date_is_allowed_and_resumes(case: str, tmp_path: Any) -> None:
    """Without the name, and broken off after the cut, the run ends with the same weights."""
    name, parts = GOOD[case]
    module, saver = Named(name), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module, [*parts(), saver], batches(4), 4, enable_checkpointing=True)
    plain = Plain()
    fit(plain, parts(), batches(4), 4)
    assert_equal(weights(module.lm), weights(plain.lm))
    again = Named(name)
    trainer = trainer_for(parts(), 3)
    trainer.fit(again, batches(4), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    before = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert_equal(dict(again.state_dict()), before)


def test_the_list_is_what_the_model_runs() -> None:
    module = Named(lambda lm: lm.model.layers)
    fit(module, depth(), batches(3), 3)
    assert module.other is module.lm.model.layers
    assert len(module.other) == 4
    assert len([name for name in module.state_dict() if name.startswith("other.")]) == 4 * 16


def test_a_layer_that_a_known_plan_keeps(tmp_path: Any) -> None:
    PruningPlan.dropping(anatomy_of(tiny_lm()), [2]).save(tmp_path / "plan.json")
    parts = [PlanFromFile(str(tmp_path / "plan.json")), StructuredCut(at=1, validate=False)]
    module = Named(lambda lm: lm.model.layers[4])
    fit(module, parts, batches(2), 2)
    assert module.other is module.lm.model.layers[3]


def test_adapters_beside_another_name_for_the_list(tmp_path: Any) -> None:
    pytest.importorskip("peft")

    def parts() -> list[Callback]:
        return [*depth(), LoRARecovery(r=2)]

    module, saver = (
        Named(lambda lm: lm.model.layers),
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
    )
    fit(module, [*parts(), saver], batches(4), 4, enable_checkpointing=True)
    plain = Plain()
    fit(plain, parts(), batches(4), 4)
    assert_equal(weights(module.lm), weights(plain.lm))
    again = Named(lambda lm: lm.model.layers)
    trainer_for(parts(), 4).fit(again, batches(4), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert again.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("selector", [RandomSelector(drop=1), RandomUnitSelector(hidden=24)])
def test_a_selection_without_a_cut_asks_for_nothing(selector: Callback) -> None:
    fit(Named(lambda lm: [*lm.model.layers]), [selector], batches(1), 1)
