"""Invariant 7: what cannot work is refused in one sentence, before the first step, and everything is left as it was."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightprune import (
    ActivationUnitSelector,
    BlockInfluenceSelector,
    ConfigError,
    DifferencePenalty,
    GateAnnealing,
    GreedyPerplexitySelector,
    GroupNormPenalty,
    HardConcreteSelector,
    LayerGateSelector,
    LoRARecovery,
    MagnitudeUnitSelector,
    PlanFromFile,
    ProximalGroupLasso,
    PruningPlan,
    RandomSelector,
    RandomUnitSelector,
    Recovery,
    StructuredCut,
    TaylorUnitSelector,
    export_hf,
)
from lightprune.anatomy import Shape, anatomy_of
from lightprune.selectors import Selector
from tests.families import tiny_lm
from tests.training import Plain, assert_equal, batches, fit, trainer_for, weights


class NoStep(Plain):
    """Fails the test if training begins."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("training began")


@pytest.mark.parametrize(
    "selector",
    [
        LayerGateSelector(drop=2, steps_per_round=1),
        BlockInfluenceSelector(drop=2, stop=2),
        GreedyPerplexitySelector(drop=2, stop=2),
    ],
    ids=lambda selector: type(selector).__name__,
)
def test_a_window_that_was_over_before_the_selector_came(selector: Callback, tmp_path: Any) -> None:
    dense = fit(Plain(), [], batches(3), 3)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    trainer = trainer_for([selector, StructuredCut(at=8)], 10)
    with pytest.raises(ConfigError, match=r"start is 0, and this run goes on from step 3 .* at least 3"):
        trainer.fit(Plain(), batches(10), ckpt_path=tmp_path / "dense.ckpt", weights_only=False)


class AnotherCut(StructuredCut):
    """Lightning itself refuses two stateful callbacks of one class."""


def unknown_family() -> NoStep:
    config = CONFIG_MAPPING["gemma"](
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32,
    )  # fmt: skip
    return NoStep(AutoModelForCausalLM.from_config(config))


def without_lm() -> NoStep:
    module = NoStep()
    module.lm = nn.Linear(2, 2)  # type: ignore[assignment]
    return module


def with_two_lms() -> NoStep:
    module = NoStep()
    module.teacher = tiny_lm(num_layers=2)
    return module


def misnamed() -> NoStep:
    module = with_two_lms()
    module.pruned_model = "student"  # type: ignore[assignment]
    return module


CASES: dict[str, tuple[Callable[[], NoStep], Callable[[], list[Callback]], dict[str, Any], str]] = {
    "unknown family": (unknown_family, lambda: [RandomSelector(drop=1)], {}, r"'gemma'.*llama.*`model`"),
    "no LM": (without_lm, lambda: [RandomSelector(drop=1)], {}, r"NoStep holds no .*`AutoModelForCausalLM`"),
    "two LMs": (with_two_lms, lambda: [RandomSelector(drop=1)], {}, r"holds 2 .*at lm and teacher.*pruned_model"),
    "a name of neither": (
        misnamed, lambda: [RandomSelector(drop=1)], {}, r"NoStep\.pruned_model is 'student', .* lm or teacher",
    ),
    "drop too many": (
        NoStep, lambda: [RandomSelector(drop=5, protect_first=1, protect_last=1)], {}, r"drop is 5.*from 1 to 4",
    ),
    "drop all": (NoStep, lambda: [BlockInfluenceSelector(drop=6)], {}, r"drop is 6.*from 1 to 5"),
    "drop where all are protected": (
        NoStep, lambda: [RandomSelector(drop=1, protect_first=4, protect_last=3)], {},
        r"drop is 1.*6 of them protected, so none can go; protect fewer layers",
    ),
    "drop of the only layer": (
        lambda: NoStep(tiny_lm(num_layers=1)), lambda: [RandomSelector(drop=1)], {},
        r"has 1 layers.*so none can go; leave RandomSelector out",
    ),
    "drop none": (NoStep, lambda: [GreedyPerplexitySelector(drop=0)], {}, r"drop is 0.*from 1 to 5"),
    "negative protection": (NoStep, lambda: [RandomSelector(drop=1, protect_last=-1)], {}, r"protect_last is -1"),
    "reversed window of a selector": (
        NoStep,
        lambda: [BlockInfluenceSelector(drop=1, start=5, stop=3)],
        {},
        r"opens at step 5 and closes at step 3.*`stop`",
    ),
    "an empty window": (
        NoStep, lambda: [GreedyPerplexitySelector(drop=1, start=3, stop=3)], {}, r"closes at step 3.*`stop`",
    ),
    "no rounds": (NoStep, lambda: [LayerGateSelector(drop=2, rounds=0)], {}, r"rounds is 0.*drop=2"),
    "gates for nothing": (NoStep, lambda: [LayerGateSelector(drop=0)], {}, r"drop is 0.*from 1 to 5"),
    "a window that begins before the run": (
        NoStep, lambda: [BlockInfluenceSelector(drop=1, start=-1)], {}, r"start is -1",
    ),
    "cut before selection ends": (
        NoStep,
        lambda: [LayerGateSelector(drop=2, steps_per_round=5), StructuredCut(at=9)],
        {},
        r"StructuredCut.at is 9.*LayerGateSelector.*step 10.*at least 10",
    ),
    "transfer before selection ends": (
        NoStep,
        lambda: [BlockInfluenceSelector(drop=1, stop=6), DifferencePenalty(start=4), StructuredCut(at=9)],
        {},
        r"DifferencePenalty.start is 4.*step 6",
    ),
    "transfer after the cut": (
        NoStep,
        lambda: [RandomSelector(drop=1), GateAnnealing(stop=12), StructuredCut(at=9)],
        {},
        r"GateAnnealing.stop is 12, after the cut at 9",
    ),
    "reversed window of a regularizer": (
        NoStep,
        lambda: [RandomSelector(drop=1), GateAnnealing(start=6, stop=5), StructuredCut(at=9)],
        {},
        r"starts at step 6 and stops at step 5",
    ),
    "no time for the transfer": (
        NoStep,
        lambda: [BlockInfluenceSelector(drop=1, stop=6), GateAnnealing(), StructuredCut(at=6)],
        {},
        r"starts at step 6 and stops at step 6",
    ),
    "nothing to select": (NoStep, lambda: [StructuredCut(at=3)], {}, r"nothing to cut.*selector"),
    "nothing to empty": (NoStep, lambda: [GateAnnealing(stop=3)], {}, r"no plan.*selector"),
    "a ramp without an end": (NoStep, lambda: [RandomSelector(drop=1), GateAnnealing()], {}, r"stop is not set"),
    "nothing to fade out for": (
        NoStep,
        lambda: [RandomSelector(drop=1), GateAnnealing(stop=3)],
        {},
        r"GateAnnealing.*there is none.*StructuredCut",
    ),
    "averaged weights": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=2), WeightAveraging()],
        {},
        r"WeightAveraging keeps a copy of the uncut model.*trainer.callbacks",
    ),
    "stochastically averaged weights": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=2), StochasticWeightAveraging(swa_lrs=0.1)],
        {"max_epochs": 3},
        r"StochasticWeightAveraging keeps a copy of the uncut model.*trainer.callbacks",
    ),
    "a last gate that shrinks freely": (
        NoStep,
        lambda: [LayerGateSelector(drop=1, placement="output")],
        {},
        r"protect_last is 0 with placement=output.*at least 1.*placement=residual",
    ),
    "nothing to recover from": (
        NoStep, lambda: [RandomSelector(drop=1), Recovery(lr=1e-3)], {}, r"Recovery.*StructuredCut",
    ),
    "negative l1": (NoStep, lambda: [LayerGateSelector(drop=1, l1=-0.1)], {}, r"LayerGateSelector.l1 is -0.1"),
    "negative gate rate": (NoStep, lambda: [LayerGateSelector(drop=1, lr=-1.0)], {}, r"LayerGateSelector.lr is -1.0"),
    "empty rounds": (
        NoStep, lambda: [LayerGateSelector(drop=1, steps_per_round=0)], {}, r"steps_per_round is 0",
    ),
    "too many rounds": (NoStep, lambda: [LayerGateSelector(drop=2, rounds=3)], {}, r"rounds is 3.*drop=2"),
    "no patience": (NoStep, lambda: [LayerGateSelector(drop=2, patience=0)], {}, r"patience is 0"),
    "negative strength": (
        NoStep,
        lambda: [RandomSelector(drop=1), DifferencePenalty(strength=-1.0), StructuredCut(at=9)],
        {},
        r"DifferencePenalty.strength is -1.0",
    ),
    "negative recovery rate": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=9), Recovery(lr=-1.0)],
        {},
        r"Recovery.lr is -1.0",
    ),
    "decay without an end": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=2), Recovery(lr=1.0, decay="cosine")],
        {"max_steps": -1, "max_epochs": 1},
        r"Recovery.decay is 'cosine'.*max_steps",
    ),
    "a warm-up beyond the end of the run": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=8), Recovery(lr=1.0, warmup_steps=3)],
        {},
        r"warmup_steps is 3.*from the cut at 8 to trainer.max_steps 10 there are 2 steps.*at most 2",
    ),
    "two selectors": (
        NoStep,
        lambda: [RandomSelector(drop=1), BlockInfluenceSelector(drop=1)],
        {},
        r"RandomSelector and BlockInfluenceSelector both select layers",
    ),
    "two cuts at once": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=4), AnotherCut(at=4)],
        {},
        r"more than one.* at step 4",
    ),
    "a second cut without a selector": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=4), StructuredCut(at=5)],
        {},
        r"at step 5 has nothing to cut.* starts after the cut before",
    ),
    "more layers than the first cut leaves": (
        NoStep,
        lambda: [
            RandomSelector(drop=4), StructuredCut(at=2), RandomSelector(drop=2, start=3), StructuredCut(at=4),
        ],
        {},
        r"drop is 2: the model has 2 layers.*from 1 to 1",
    ),
    "max_steps before the cut": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=11)],
        {},
        r"max_steps is 10, before the cut at 11",
    ),
    "too few epochs": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=11)],
        {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2},
        # 5 batches an epoch, two a step, the last step of an epoch takes what is left.
        r"after 6 optimizer steps \(2 epochs\), before the cut at 11.*at most 6",
    ),
    "epochs that end before max_steps": (
        NoStep,
        lambda: [RandomSelector(drop=1), StructuredCut(at=8)],
        {"max_steps": 10, "max_epochs": 1},
        r"after 5 optimizer steps \(1 epochs\), before the cut at 8",
    ),
}  # fmt: skip


Make = Callable[..., Callback]

# A part whose one setting is bad; what misses a cut or a selector gets them.
CHOICES: list[tuple[Make, str, str]] = [
    (partial(LayerGateSelector, drop=1), "placement", "residual, output"),
    (partial(ActivationUnitSelector, channels=24), "metric", "mean, l2, fluctuation"),
    (partial(TaylorUnitSelector, channels=24), "accumulate", "squared, absolute"),
    (partial(MagnitudeUnitSelector, channels=24), "norm", "l1, l2"),
    (DifferencePenalty, "norm", "l1, l2"),
    (DifferencePenalty, "ramp", "constant, linear"),
    (DifferencePenalty, "order", "joint, first_to_last, last_to_first"),
    (GroupNormPenalty, "norm", "l1, l2"),
    (GroupNormPenalty, "ramp", "constant, linear"),
    (GateAnnealing, "shape", "linear, cosine"),
    (GateAnnealing, "order", "joint, first_to_last, last_to_first"),
    (partial(Recovery, lr=1.0), "decay", "constant, linear, cosine"),
]

NAN, INFINITY = float("nan"), float("inf")
A_STEP = "a whole number of optimizer steps, or a share of the run from 0% to 100%, such as 75%"
NUMBERS: list[tuple[Make, str, tuple[Any, ...], str]] = [
    (RandomSelector, "drop", (True, "1", 1.5, None), "a whole number"),
    (LayerGateSelector, "drop", (True, "1", 1.5, None), "a whole number"),
    (partial(RandomSelector, drop=1), "start", (0.5, None), "a whole number, at least 0"),
    (partial(RandomSelector, drop=1), "seed", (0.5, "x"), "a whole number"),
    (partial(RandomSelector, drop=1), "protect_first", (True, "1"), "a whole number, at least 0"),
    (partial(BlockInfluenceSelector, drop=1), "stop", (2.5, "4", None), "a whole number"),
    (partial(LayerGateSelector, drop=1), "l1", (NAN, INFINITY, "1"), "a finite number, at least 0"),
    (partial(LayerGateSelector, drop=1), "lr", (0, 0.0), "above 0"),
    (partial(LayerGateSelector, drop=1), "start", (0.5, "0"), "a whole number"),
    (partial(LayerGateSelector, drop=1), "rounds", (0.5, "1", True), "a whole number, or null"),
    (partial(LayerGateSelector, drop=1), "steps_per_round", (1.5, "2"), "a whole number"),
    (partial(LayerGateSelector, drop=1), "patience", (1.5, True), "a whole number, at least 1, or null"),
    (RandomUnitSelector, "channels", (True, "32", [32]), "a count from 1 to 48, or a ratio"),
    (RandomUnitSelector, "heads", (False, "2"), "a count from 1 to 4, or a ratio"),
    (partial(RandomUnitSelector, channels=0.5), "multiple_of", (1.5, "8", True), "a whole number, at least 1"),
    (partial(RandomUnitSelector, channels=24), "seed", ("x",), "a whole number"),
    (partial(HardConcreteSelector, 4), "parameters", ("0.5", True, NAN), "a whole number below .* or a ratio"),
    (partial(HardConcreteSelector, 4, parameters=0.5), "multiple_of", (1.5,), "a whole number, at least 1"),
    (partial(HardConcreteSelector, 4, layers=3), "lr", (NAN, "1"), "a finite number, above 0"),
    (partial(HardConcreteSelector, 4, layers=3), "warmup", (-0.1, 1.5), "at least 0 and at most 1"),
    (partial(HardConcreteSelector, 4, layers=3), "seed", (0.5,), "a whole number, at least 0"),
    (DifferencePenalty, "strength", (NAN, INFINITY, "1"), "a finite number, at least 0"),
    (GroupNormPenalty, "strength", (NAN, True), "a finite number, at least 0"),
    (ProximalGroupLasso, "strength", (INFINITY, "1"), "a finite number, at least 0, or null"),
    (GateAnnealing, "start", (0.5,), "a whole number, at least 0, or null"),
    (GateAnnealing, "stop", (2.5,), "a whole number, or null"),
    (StructuredCut, "at", (2.5, NAN), "a whole number, at least 0"),
    (Recovery, "lr", (NAN, "1e-3", None), "a finite number, at least 0"),
    (partial(Recovery, lr=1.0), "warmup_steps", (1.5,), "a whole number, at least 0"),
    (partial(Recovery, lr=1.0), "final_ratio", (1.5, -0.5), "at least 0 and at most 1"),
    (partial(RandomSelector, drop=1), "start", ("0",), A_STEP),
    (GateAnnealing, "start", ("1",), A_STEP),
    (GateAnnealing, "stop", ("4", "x%"), A_STEP),
    (StructuredCut, "at", ("4", "101%"), A_STEP),
    (partial(Recovery, lr=1.0), "warmup_steps", ("2",), A_STEP),
    (LoRARecovery, "r", (2.5, "8", True), "a whole number, at least 1"),
    (LoRARecovery, "dropout", (NAN, "0"), "a finite number, at least 0 and below 1"),
]


def sentence_about(make: Make, setting: dict[str, Any]) -> str:
    """What a run with a part of this setting is refused with: one sentence, before the first step."""

    def run() -> None:
        part = make(**setting)
        selector = [] if isinstance(part, Selector) else [RandomSelector(drop=1)]
        cut = [] if isinstance(part, StructuredCut) else [StructuredCut(at=60)]
        trainer_for([*selector, *cut, part], 70).fit(NoStep(), batches(1))

    with pytest.raises(ConfigError) as error:
        run()
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text
    return text


@pytest.mark.parametrize(("make", "key", "allowed"), CHOICES)
def test_misspelt_choices(make: Make, key: str, allowed: str) -> None:
    assert sentence_about(make, {key: "typo"}).endswith(f".{key} is 'typo': it must be one of {allowed}.")


@pytest.mark.parametrize(
    ("make", "key", "value", "allowed"),
    [(make, key, value, allowed) for make, key, values, allowed in NUMBERS for value in values],
)
def test_numbers_that_are_none(make: Make, key: str, value: Any, allowed: str) -> None:
    start = re.escape(f"{key} is {value!r}: ")
    assert re.search(rf"^\w+\.{start}.*must be {allowed}", sentence_about(make, {key: value}))


def test_a_selector_that_selects_nothing_is_told_all_it_could() -> None:
    said = sentence_about(HardConcreteSelector, {"stop": 4})
    assert all(f"`{key}`" in said for key in ("layers", "heads", "kv_groups", "channels", "hidden", "parameters"))


@pytest.mark.parametrize(("names", "found"), [([], "empty"), (None, "None"), (3, "3")])
def test_adapters_of_nothing(names: Any, found: str) -> None:
    pytest.importorskip("peft")
    assert f"target_modules is {found}: name at least one of " in sentence_about(
        LoRARecovery, {"target_modules": names}
    )


def test_what_is_no_model(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="anatomy_of takes a Hugging Face causal LM, and `lm` is of type NoneType"):
        anatomy_of(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="export_hf takes a Hugging Face causal LM, and `lm` is of type Linear"):
        export_hf(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def attached(owner: Any) -> dict[str, Any]:
    """What a run can leave behind on an object: hooks, and methods shadowed on the instance."""
    return {
        name: (sorted(value) if isinstance(value, dict) else value)
        for name, value in vars(owner).items()
        if name.endswith("_hooks") or callable(value)
    }


@pytest.mark.parametrize("name", CASES)
def test_refused_before_the_first_step(name: str) -> None:
    make_module, make_callbacks, kwargs, message = CASES[name]
    module, callbacks = make_module(), make_callbacks()
    trainer = trainer_for(callbacks, **({"max_steps": 10} | kwargs))
    before, shape = weights(module), [attached(child) for child in module.modules()]
    strategy = set(vars(trainer.strategy))
    with pytest.raises(ConfigError, match=message) as error:
        trainer.fit(module, batches(5), batches(1))
    # One sentence.
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text
    # Nothing moved, nothing left behind.
    assert trainer.global_step == 0
    assert_equal(weights(module), before)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert [attached(child) for child in module.modules()] == shape
    assert {key for key in set(vars(trainer.strategy)) - strategy if callable(vars(trainer.strategy)[key])} == set()
    assert all(getattr(callback, "plan", None) is None for callback in callbacks)


def plan_file(path: Any, **changes: Any) -> str:
    values = PruningPlan.dropping(anatomy_of(tiny_lm()), [1]).to_dict()
    counts = {name: value for name, value in changes.items() if name in values["source"]}
    values |= {name: value for name, value in changes.items() if name not in counts}
    values["source"] |= counts
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "opt"}, r"another model.*`model_type` is 'opt'.*'llama'"),
        ({"layers": 8}, r"another model.*`layers` is 8.*6"),
        ({"hidden": 48}, r"another model.*`hidden` is 48.*32"),
        ({"kept_layers": []}, r"`kept_layers` are \[\]"),
        ({"kept_layers": [0, 6]}, r"from 0 to 5"),
        ({"kept_layers": [-1, 2]}, r"from 0 to 5"),
        ({"kept_layers": [2, 1]}, r"ascending"),
        ({"kept_layers": [1, 1]}, r"distinct"),
        ({"kept_layers": [99], "kept_heads": ((0, 1),) * 6}, r"`kept_layers` are \[99\].*from 0 to 5"),
        ({"kept_heads": ()}, r"`kept_heads` has 0 entries"),
        ({"kept_heads": ((0, 1),) * 6, "kv_groups": 9}, r"`source` can be no model's: 4 query heads.*9 key-value"),
    ],
)
def test_a_plan_for_another_model(changes: dict[str, Any], message: str, tmp_path: Any) -> None:
    module = NoStep()
    selector = PlanFromFile(plan_file(tmp_path / "plan.json", **changes))
    with pytest.raises(ConfigError, match=message):
        trainer_for([selector, StructuredCut(at=3)], 5).fit(module, batches(5))
    assert module.lm.config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_layers": [0, 9]}, r"`kept_layers` are \[0, 9\].*from 0 to 3"),
        ({"model_type": "opt"}, r"made for 'opt' of .*by then this model is 'llama'"),
        ({"layers": 5}, r"made for 'llama' of Shape\(layers=5.*by then .*Shape\(layers=4"),
    ],
)
def test_a_plan_for_a_second_cut(changes: dict[str, Any], message: str, tmp_path: Any) -> None:
    """Its model is not there yet, and it is refused all the same."""
    plan = plan_file(tmp_path / "plan.json", **({"layers": 4, "kept_layers": [0, 2]} | changes))
    parts = [RandomSelector(drop=2), StructuredCut(at=1), PlanFromFile(plan, start=2), StructuredCut(at=3)]
    with pytest.raises(ConfigError, match=message):
        trainer_for(parts, 5).fit(NoStep(), batches(5))


def json_plan(**changes: Any) -> str:
    return json.dumps(PruningPlan("llama", Shape(6, 32, 4, 2, 8, 48), (0, 1)).to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no pruning plan at"),
        ("{", "not valid JSON"),
        ("[]", "exactly the fields"),
        ("{}", "exactly the fields"),
        (json_plan(extra=1), "exactly the fields"),
        (json_plan(format=9), "`format` is 9"),
        (json_plan(kept_layers=[0.5]), "whole numbers"),
        (json_plan(kept_layers=3), "whole numbers"),
        (json_plan(source={"layers": "6"}), "whole numbers"),
        (json_plan(kept_heads=[0]), "whole numbers"),
        (json_plan(kept_channels="all"), "null or a list of lists"),
    ],
)
def test_a_file_that_is_no_plan(text: str | None, message: str, tmp_path: Any) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        trainer_for([PlanFromFile(str(path))], 5).fit(NoStep(), batches(5))


def test_a_path_that_leads_to_no_text(tmp_path: Any) -> None:
    path = tmp_path / "plan.bin"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "plan.bin' is no pruning plan" in sentence_about(PlanFromFile, {"path": str(path)})
    assert "no pruning plan at 'None'" in sentence_about(PlanFromFile, {"path": None})


def test_a_run_of_unknown_length_may_contain_the_cut() -> None:
    """Refusing is for what cannot work: an endless data set, or epochs that are just long enough, can."""
    cut = StructuredCut(at=6, validate=False)
    trainer = trainer_for([RandomSelector(drop=1), cut], -1, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Plain(), batches(5))
    assert cut.done


def test_the_module_can_be_fitted_after_a_refusal() -> None:
    module = Plain()
    with pytest.raises(ConfigError):
        trainer_for([RandomSelector(drop=9)], 2).fit(module, batches(2))
    cut = StructuredCut(at=1, validate=False)
    trainer_for([RandomSelector(drop=1), cut], 2).fit(module, batches(2))
    assert cut.done


def test_what_goes_wrong_in_training_leaves_nothing_behind() -> None:
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    for selector in (LayerGateSelector(drop=2, steps_per_round=2), RandomSelector(drop=2)):
        module = Broken()
        shape = [attached(child) for child in module.modules()]
        parts = [selector, GateAnnealing(), DifferencePenalty(), StructuredCut(at=6)]
        with pytest.raises(RuntimeError, match="broken"):
            trainer_for(parts, 8).fit(module, batches(8))
        assert [attached(child) for child in module.modules()] == shape
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_two_selectors_of_one_class_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `RandomSelector`"):
        trainer_for([RandomSelector(drop=1), RandomSelector(drop=2)], 2)


def test_fused_optimizer_with_clipping() -> None:
    """Lightning refuses it only at the first step that moves weights, which may come long after the selection."""
    module = NoStep(optimizer=partial(torch.optim.AdamW, fused=True))
    trainer = trainer_for([RandomSelector(drop=1)], max_steps=1, precision="bf16-mixed", gradient_clip_val=1.0)
    with pytest.raises(ConfigError, match=r"gradient_clip_val is 1\.0 and AdamW is fused"):
        trainer.fit(module, batches(1))


def test_callbacks_that_have_cut_another_model() -> None:
    """They would train this one and never cut it."""
    parts = [RandomSelector(drop=2), StructuredCut(at=1, validate=False)]
    trainer = fit(Plain(), parts, batches(1), max_steps=1)
    fresh = NoStep()
    with pytest.raises(ConfigError, match=r"in another trainer's fit.*new callbacks"):
        fit(fresh, parts, batches(2), max_steps=2)
    trainer.fit_loop.epoch_loop.max_steps = 2
    with pytest.raises(ConfigError, match=r"has cut a model already.* still whole.*new callbacks"):
        trainer.fit(fresh, batches(2))
    assert len(anatomy_of(fresh.lm).layers) == 6


class Interrupted(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise RuntimeError("the node went down")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("stop", [1, 4], ids=["a plan", "half of a window"])
def test_callbacks_of_a_fit_that_broke_off(stop: int) -> None:
    """They hold what they saw of another model."""
    parts = [BlockInfluenceSelector(drop=2, stop=stop), GateAnnealing(), StructuredCut(at=6)]
    with pytest.raises(RuntimeError, match="went down"):
        fit(Interrupted(), parts, batches(8), max_steps=8)
    with pytest.raises(
        ConfigError, match=r"BlockInfluenceSelector, GateAnnealing, StructuredCut have been in another trainer's fit"
    ):
        fit(NoStep(), parts, batches(8), max_steps=8)


def test_the_cut_module_in_another_fit_of_the_same_callbacks() -> None:
    """Recovery would count from a step that this fit does not have."""
    module, parts = Plain(), [RandomSelector(drop=2), StructuredCut(at=2, validate=False), Recovery(lr=0.1)]
    fit(module, parts, batches(3), max_steps=3)
    with pytest.raises(ConfigError, match="have been in another trainer's fit"):
        fit(module, parts, batches(3), max_steps=3)


def test_callbacks_that_have_evaluated_a_checkpoint(tmp_path: Any) -> None:
    """They have its gates, and this model has its own weights."""

    def parts() -> list[Callback]:
        return [LayerGateSelector(drop=2, steps_per_round=3), StructuredCut(at=6)]

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(Plain(), [*parts(), saver], batches(8), 8, enable_checkpointing=True)
    trainer = trainer_for(parts(), 8)
    trainer.validate(Plain(), batches(1), ckpt_path=tmp_path / "step=2.ckpt", verbose=False, weights_only=True)
    with pytest.raises(ConfigError, match="or have loaded a checkpoint, and still hold"):
        trainer.fit(NoStep(), batches(8), batches(1))
    trainer.fit(Plain(), batches(8), batches(1), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert trainer.global_step == 8


def test_checkpoints_of_weights_alone(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    parts = [RandomSelector(drop=2), StructuredCut(at=1), saver]
    with pytest.raises(ConfigError, match=r"ModelCheckpoint\.save_weights_only is true, which leaves out the plan"):
        fit(NoStep(), parts, batches(2), 2, enable_checkpointing=True)


class Around(NoStep):
    """A module with something beside the LM."""

    pruned_model = "lm"

    def __init__(self, beside: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.beside = beside(self.lm)


def test_an_average_of_the_weights_in_the_module() -> None:
    parts = [RandomSelector(drop=2), StructuredCut(at=1)]
    with pytest.raises(ConfigError, match="beside is an AveragedModel: it keeps a copy of the uncut model"):
        fit(Around(AveragedModel), parts, batches(2), 2)


def test_an_average_of_something_else() -> None:
    parts = [RandomSelector(drop=2), StructuredCut(at=1)]
    fit(Beside(lambda lm: AveragedModel(nn.Linear(3, 3))), parts, batches(1), 1)


def reader(lm: Any) -> nn.Module:
    head = nn.Linear(32, 256, bias=False)
    head.weight = lm.model.embed_tokens.weight
    return head


def test_a_parameter_of_the_lm_elsewhere_in_the_module() -> None:
    parts = [MagnitudeUnitSelector(hidden=24), StructuredCut(at=1)]
    with pytest.raises(ConfigError, match=r"beside\.weight is the LM's model\.embed_tokens\.weight, and the cut puts"):
        fit(Around(reader), parts, batches(2), 2)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_for_the_gradient_of_what_is_sliced(register: str) -> None:
    def watched(lm: Any) -> None:
        getattr(lm.model.layers[1].mlp.up_proj.weight, register)(lambda gradient: None)

    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight has hooks for its gradient"):
        fit(Around(watched), [MagnitudeUnitSelector(channels=32), StructuredCut(at=1)], batches(2), 2)
    for parts in ([RandomSelector(drop=1), StructuredCut(at=1)], [MagnitudeUnitSelector(channels=32)]):
        fit(Beside(watched), parts, batches(1), 1)  # there it stays as it is


def test_a_head_that_may_read_hidden_states() -> None:
    with pytest.warns(UserWarning, match="beside has a dimension of 32, as the LM's hidden states have now"):
        fit(Beside(lambda lm: nn.Linear(32, 1)), [MagnitudeUnitSelector(hidden=24), StructuredCut(at=1)], batches(1), 1)


class Beside(Plain):
    def __init__(self, beside: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.beside = beside(self.lm)


def test_a_checkpoint_from_before_the_cut_in_a_module_that_is_cut(tmp_path: Any) -> None:
    module, parts = Plain(), [RandomSelector(drop=2), StructuredCut(at=2, validate=False)]
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(module, [*parts, saver], batches(3), max_steps=3, enable_checkpointing=True)
    trainer.fit_loop.epoch_loop.max_steps = 4
    with pytest.raises(ConfigError, match="saved before the cut and this model is already cut"):
        trainer.fit(module, batches(4), ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)


@pytest.mark.parametrize("how", ["in place", "wrapped", "Lightning's module"])
def test_what_is_compiled(how: str) -> None:
    """Hooks that attach after a pass was compiled would be left out of it."""
    module = NoStep()
    if how == "in place":
        module.lm.compile(backend="eager")
    elif how == "wrapped":
        module.lm = torch.compile(module.lm, backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    with pytest.raises(ConfigError, match="is compiled, and gates and penalties cannot join"):
        fit(module, [RandomSelector(drop=2), StructuredCut(at=1)], batches(2), 2)
