"""A run with LoRA that is broken off anywhere and resumed ends as one that never was, bit for bit."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM

from lightprune import ConfigError, ExportHF, RandomSelector, RandomState, RandomUnitSelector, Recovery, StructuredCut
from lightprune.recovery import LoRARecovery
from tests.families import tiny_lm
from tests.resume_run import Shuffled
from tests.training import Plain, Spy, assert_equal, batches, trainer_for, weights

CUT, STEPS = 2, 6


class BreakOff(Callback):
    """Ends a run as the batch begins that follows so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


class BreakOffAtTheEnd(Callback):
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise InterruptedError


def one_group(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    return AdamW([parameter for _, parameter in parameters], lr=1e-2)


def trainable_in_groups(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Adapters, or frozen weights, would fall into other groups than the weights that it is meant for."""
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    attention = [parameter for name, parameter in named if name.split(".")[-3:-2] == ["self_attn"]]
    rest = [parameter for name, parameter in named if name.split(".")[-3:-2] != ["self_attn"]]
    return AdamW([{"params": attention, "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def run(folder: Path, case: dict[str, Any], *first: Callback, seed: int = 0, max_steps: int = STEPS) -> dict[str, Any]:
    """Train to the end, from `folder`'s last checkpoint if there is one."""
    torch.manual_seed(seed)
    accumulate = case.get("accumulate", 1)
    optimizer: Callable[..., Optimizer] = case.get("optimizer", one_group)
    module = Plain(
        tiny_lm(case.get("family", "llama_tied")),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2 * STEPS),
    )
    module.make_optimizer = lambda _: optimizer(module.named_parameters())
    on_validation = case.get("on validation", False)
    before_end = Spy(lambda trainer, module: (weights(module), states(trainer)), "on_train_end")
    trainer = trainer_for(
        [
            *first,
            before_end,
            *([ExportHF(str(folder / "pruned"))] if case.get("export") else []),
            LoRARecovery(r=2, alpha=6, **case.get("settings", {})),
            *([Recovery(lr=0.02, decay="linear")] if case.get("recovery") else []),
            StructuredCut(at=CUT, validate=on_validation),
            RandomSelector(drop=3),
            *([RandomUnitSelector(**case["units"])] if "units" in case else []),
            RandomState(seed=7),
            ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=False)
            if on_validation
            else ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0),
        ],
        max_steps,
        enable_checkpointing=True,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        **case.get("trainer", {}),
    )
    trainer.fit(module, Shuffled(3 * accumulate), batches(1), ckpt_path="last", weights_only=True)  # type: ignore[arg-type]
    return {"merged": weights(module), "before the end": before_end.seen, "step": trainer.global_step}


def states(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def assert_same(left: Any, right: Any) -> None:
    """Nested values, bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "before the cut": ({}, [CUT - 1]),
    "at the cut": ({"recovery": True, "units": {"hidden": 16, "kv_groups": 1}}, [CUT]),
    "everywhere, Conv1D": ({"family": "gpt2", "accumulate": 2, "units": {"channels": 24}}, [CUT, CUT + 1, STEPS - 1]),
    "groups by name": ({"optimizer": trainable_in_groups, "trainer": {"gradient_clip_val": 0.1}}, [CUT + 2]),
    "dropout, some projections": (
        {"settings": {"dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}, "recovery": True},
        [CUT + 1],
    ),
    "half precision": ({"trainer": {"precision": "bf16-true"}}, [CUT + 1]),
    "saved by the validation at the cut": (
        {"on validation": True, "trainer": {"val_check_interval": 3}},
        [CUT, CUT + 1],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_broken_off_and_resumed(name: str, tmp_path: Path) -> None:
    case, stops = CASES[name]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = run(undisturbed, case, seed=1)
    for seed, stop in enumerate(stops, start=2):
        with pytest.raises(InterruptedError):
            run(disturbed, case, BreakOff(stop), seed=seed)
    found = run(disturbed, case, seed=9)
    assert_same(found, expected)
    assert found["step"] == STEPS
    (saved,) = disturbed.glob("last.ckpt")
    assert any("lora_" in key for key in torch.load(saved, weights_only=True)["state_dict"])


@pytest.mark.parametrize("exported", [True, False])
def test_one_that_had_only_its_end_left_is_merged(exported: bool, tmp_path: Path) -> None:
    case = {"export": exported}
    expected = run(tmp_path / "undisturbed", case)
    with pytest.raises(InterruptedError):
        run(tmp_path / "disturbed", case, BreakOffAtTheEnd())
    found = run(tmp_path / "disturbed", case)
    assert_same(found["merged"], expected["merged"])
    if exported:
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "disturbed" / "pruned")
        assert_equal(weights(written), {name.removeprefix("lm."): w for name, w in expected["merged"].items()})


def test_a_checkpoint_saved_after_the_end_begins_new_adapters(tmp_path: Path) -> None:
    def trainer(steps: int, *first: Callback) -> L.Trainer:
        return trainer_for(
            [*first, RandomSelector(drop=3), StructuredCut(at=1, validate=False), LoRARecovery(r=2)], steps
        )

    module = Plain(optimizer=lambda p: AdamW(p, lr=1e-2))
    ended = trainer(3)
    ended.fit(module, batches(3), batches(1))
    ended.save_checkpoint(tmp_path / "end.ckpt")
    begun = weights(module)

    fresh = Plain(optimizer=lambda p: AdamW(p, lr=1e-2))
    end = Spy(lambda _, module: weights(module), "on_train_end")
    trainer(5, end).fit(fresh, Shuffled(5), batches(1), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    (found,) = end.seen
    assert_equal({n.replace(".base_layer", ""): w for n, w in found.items() if "lora_" not in n}, begun)
    assert all(w.abs().max() > 0 for n, w in found.items() if "lora_B" in n)
    assert weights(fresh).keys() == begun.keys()


def test_the_same_callbacks_go_on_after_a_fit_that_was_broken_off(tmp_path: Path) -> None:
    """In a notebook: the module still has its adapters when the checkpoint is loaded into it."""
    expected = run(tmp_path / "undisturbed", {})
    module = Plain(
        tiny_lm(), optimizer=lambda p: AdamW(p, lr=1e-2),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2 * STEPS),
    )  # fmt: skip
    stop = BreakOff(CUT + 1)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
    callbacks = [
        stop, RandomSelector(drop=3), StructuredCut(at=CUT, validate=False), LoRARecovery(r=2, alpha=6),
        RandomState(seed=7), saver,
    ]  # fmt: skip
    trainer = trainer_for(callbacks, STEPS, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(InterruptedError):
        trainer.fit(module, Shuffled(3), batches(1))
    assert any("lora_" in name for name in weights(module))
    stop.step = -1
    trainer = trainer_for(callbacks, STEPS, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(module, Shuffled(3), batches(1), ckpt_path="last", weights_only=True)
    assert_same(weights(module), expected["merged"])


@pytest.mark.parametrize("broken_off", [False, True])
def test_what_has_fitted_validates_a_checkpoint_with_adapters(broken_off: bool, tmp_path: Path) -> None:
    """As `trainer.test(ckpt_path="best")` does; the optimizers that the fit left have nothing to do with it."""
    module = Plain(optimizer=lambda p: AdamW(p, lr=1e-2))
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [RandomSelector(drop=3), StructuredCut(at=1, validate=False), LoRARecovery(r=2), saver]
    callbacks += [BreakOff(4)] if broken_off else []
    trainer = trainer_for(callbacks, 5, enable_checkpointing=True)
    with pytest.raises(InterruptedError) if broken_off else nullcontext():
        trainer.fit(module, batches(5), batches(1))
    if broken_off:
        trainer = trainer_for(callbacks, 5, enable_checkpointing=True)
    (with_adapters,) = trainer.validate(module, batches(1), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    assert not any("lora_" in name for name in weights(module))
    # What is left is that checkpoint's model, merged.
    merged = module.lm.eval()(**batches(1)[0]).loss.item()
    assert with_adapters["val/loss"] == pytest.approx(merged, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 4}, ["LoRARecovery.r is 4", "have 2"]),
        ({"alpha": 8}, ["LoRARecovery.alpha is 8", "have 6"]),
        ({"use_rslora": True}, ["LoRARecovery.use_rslora is True", "have False"]),
        ({"target_modules": ["q_proj"]}, ["LoRARecovery.target_modules", "self_attn.v_proj"]),
    ],
)
def test_other_adapters_than_the_checkpoints_are_refused(
    settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InterruptedError):
        run(tmp_path, {}, BreakOff(CUT + 1))
    callbacks = [RandomSelector(drop=3), StructuredCut(at=CUT, validate=False)]
    trainer = trainer_for([*callbacks, LoRARecovery(**({"r": 2, "alpha": 6} | settings))], STEPS)
    with pytest.raises(ConfigError) as error:
        trainer.fit(Plain(), batches(1), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
