"""LoRA after the cut, in real fits."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightprune import (
    BlockInfluenceSelector,
    ConfigError,
    ExportHF,
    PruningPlan,
    RandomSelector,
    RandomUnitSelector,
    Recovery,
    RunReport,
    StructuredCut,
    anatomy_of,
)
from lightprune.cli import PruningTrainer
from lightprune.recovery import LoRARecovery
from lightprune.surgery import cut_model
from tests.families import left_padded, tiny_lm
from tests.training import Batch, Plain, Spy, assert_equal, batches, fit, trainer_for, weights

CUT, STEPS = 2, 5


def parts(lora: LoRARecovery | None = None) -> list[Callback]:
    return [RandomSelector(drop=3), StructuredCut(at=CUT, validate=False), lora or LoRARecovery(r=2, alpha=6)]


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=1e-2)


def lm_of(module: L.LightningModule) -> PreTrainedModel:
    assert isinstance(module.lm, PreTrainedModel)
    return module.lm


def before_each_step() -> Spy:
    """Put it last: it sees the weights, by name, after the parts have moved on."""
    return Spy(lambda _, module: weights(lm_of(module)), "on_train_batch_start")


def at_the_end(look: Callable[[L.Trainer, L.LightningModule], Any]) -> Spy:
    """Put it first: it looks before the adapters are merged."""
    return Spy(look, "on_train_end")


def is_adapter(name: str) -> bool:
    return "lora_" in name


@torch.no_grad()
def logits(lm: PreTrainedModel) -> Tensor:
    modes = [(module, module.training) for module in lm.modules()]
    result: Tensor = lm.eval()(**left_padded(), use_cache=False).logits
    for module, training in modes:
        module.training = training
    return result


@pytest.mark.parametrize(
    ("family", "accumulate"),
    [("llama_tied", 2), ("gpt2", 1), ("opt", 1), ("phi3", 1), ("gpt_neox", 1), ("qwen3_moe", 1)],
)
def test_only_adapters_move_after_the_cut_and_all_of_them_do(family: str, accumulate: int) -> None:
    spy, end = before_each_step(), at_the_end(lambda _, module: weights(lm_of(module)))
    fit(
        Plain(tiny_lm(family), optimizer=adam),
        [end, *parts(), spy],
        batches(STEPS * accumulate),
        STEPS,
        accumulate_grad_batches=accumulate,
    )
    (last,), at_cut = end.seen, spy.seen[CUT * accumulate]
    assert not any(map(is_adapter, spy.seen[CUT * accumulate - 1]))
    assert last.keys() == at_cut.keys()
    still = {name for name in last if torch.equal(last[name], at_cut[name])}
    assert still == {name for name in last if not is_adapter(name)}
    # Two for each of a layer's projections.
    count = {"llama_tied": 7, "gpt2": 4, "opt": 6, "phi3": 4, "gpt_neox": 4, "qwen3_moe": 4}[family]
    dense = sum(name.endswith("mlp.up_proj.base_layer.weight") for name in last) if family == "qwen3_moe" else 0
    assert len(last) - len(still) == 2 * (3 * count + 3 * dense)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_steps_are_those_of_the_formula(family: str, use_rslora: bool) -> None:
    """By hand: the gradient of the loss at W + s B A, for A and B, on a model that never saw an adapter."""
    r, alpha, rate, data = 2, 6, 0.05, batches(STEPS)
    spy, module = before_each_step(), Plain(tiny_lm(family), optimizer=lambda p: SGD(p, lr=rate))
    fit(module, [*parts(LoRARecovery(r=r, alpha=alpha, use_rslora=use_rslora)), spy], data, STEPS)

    start = spy.seen[CUT]
    lm = tiny_lm(family)
    plan = next(c for c in module.trainer.callbacks if isinstance(c, StructuredCut)).plan
    assert plan is not None
    cut_model(anatomy_of(lm), plan)
    own = {n.replace(".base_layer", ""): w for n, w in start.items() if not is_adapter(n)}
    adapters = {n: w.clone() for n, w in start.items() if is_adapter(n)}
    assert own.keys() == dict(lm.named_parameters()).keys()
    assert all((w == 0).all() == ("lora_B" in n) for n, w in adapters.items())
    scale = alpha / r**0.5 if use_rslora else alpha / r

    def composed(adapters: dict[str, Tensor]) -> dict[str, Tensor]:
        full = dict(own)
        for name in adapters:
            if "lora_A" in name:
                product = adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
                weight = name.replace("lora_A.default.", "")
                full[weight] = own[weight] + scale * (product.T if family == "gpt2" else product)
        return full

    for batch in data[CUT:]:
        leaves = {name: w.detach().requires_grad_() for name, w in adapters.items()}
        loss = functional_call(lm, composed(leaves), kwargs={**batch, "use_cache": False}).loss
        found = torch.autograd.grad(loss, list(leaves.values()))
        adapters = {n: w.detach() - rate * g for (n, w), g in zip(leaves.items(), found, strict=True)}
    for name, weight in composed(adapters).items():
        torch.testing.assert_close(module.lm.get_parameter(name), weight, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(module.lm.get_parameter(name), weight) for name, weight in own.items())


@pytest.mark.parametrize(
    ("family", "units", "first"),
    [
        ("llama_tied", {"hidden": 16, "kv_groups": 1, "channels": 24}, "export"),
        ("gpt2", {"channels": 24}, "report"),
        ("llama_tied", {"channels": 8}, "lora"),
    ],
)
def test_what_is_exported_is_the_merged_model(family: str, units: dict[str, int], first: str, tmp_path: Path) -> None:
    export, report = ExportHF(str(tmp_path / "pruned")), RunReport(validate_at_start=False)
    cut = [*parts(), RandomUnitSelector(**units)]
    orders = {
        "export": [export, report, *cut],
        "report": [report, *cut, export],
        "lora": [*cut[2:], *cut[:2], report, export],
    }
    unmerged = at_the_end(lambda _, module: logits(lm_of(module)))
    names = [name for name, _ in tiny_lm(family, num_layers=3).named_parameters()]
    module = Plain(tiny_lm(family), optimizer=adam)
    validated = Spy(lambda _, module: any(map(is_adapter, weights(module))), "on_validation_start")
    fit(module, [unmerged, *orders[first], validated], batches(STEPS), STEPS, default_root_dir=tmp_path)
    (expected,) = unmerged.seen
    assert [name for name, _ in module.lm.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in module.parameters())
    torch.testing.assert_close(logits(module.lm), expected, rtol=1e-4, atol=1e-4)
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
    # What is reported of the end is the merged model, too.
    assert validated.seen[-1] is False
    assert f'"parameters": {exported.num_parameters()}' in (tmp_path / "summary.json").read_text()


def test_a_module_that_saves_at_its_own_end_saves_the_merged_model(tmp_path: Path) -> None:
    class Saves(Plain):
        def on_train_end(self) -> None:
            self.lm.save_pretrained(tmp_path)

    module = Saves(optimizer=adam)
    fit(module, parts(), batches(STEPS), STEPS)
    assert_equal(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(module.lm))


def test_options_schedule_clipping_and_moments_go_on() -> None:
    """Weight decay by name, as everyone groups; the adapters are where the weights were."""

    def optimizer(module: nn.Module) -> Optimizer:
        named = list(module.named_parameters())
        first = [p for n, p in named if "norm" not in n and ".layers.5." not in n]
        second = [p for n, p in named if "norm" in n]
        third = [p for n, p in named if "norm" not in n and ".layers.5." in n]
        return AdamW(
            [
                {"params": second, "weight_decay": 0.0},
                {"params": first, "weight_decay": 0.1},
                {"params": third, "weight_decay": 0.2, "lr": 1e-3},
            ],
            lr=1e-2,
        )

    module = Plain(scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)))
    module.make_optimizer = lambda _: optimizer(module)

    def groups(trainer: L.Trainer, module: L.LightningModule) -> list[dict[str, Any]]:
        names = {parameter: name for name, parameter in lm_of(module).named_parameters()}
        return [
            {**group, "params": [names[p] for p in group["params"]]} for group in trainer.optimizers[0].param_groups
        ]

    def norm(trainer: L.Trainer, module: L.LightningModule) -> float:
        grads = [p.grad for g in trainer.optimizers[0].param_groups for p in g["params"] if p.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0

    seen, clipped = Spy(groups, "on_train_batch_start"), Spy(norm, "on_before_zero_grad")
    moments = at_the_end(lambda trainer, _: [int(state["step"]) for state in trainer.optimizers[0].state.values()])
    keep_last = RandomSelector(drop=3, protect_last=1)
    callbacks = [moments, keep_last, *parts()[1:], seen, clipped]
    fit(module, callbacks, batches(STEPS), STEPS, gradient_clip_val=0.01)

    names = [name for name, _ in tiny_lm(num_layers=3).named_parameters()]
    projections = [n.removesuffix(".weight") for n in names if "proj.weight" in n]
    pairs = [f"model.{n.removeprefix('model.')}.lora_{x}.default.weight" for n in projections for x in "AB"]
    after = seen.seen[CUT]
    assert [group["params"] for group in after] == [
        [],
        [n for n in pairs if ".layers.2." not in n],
        [n for n in pairs if ".layers.2." in n],
    ]
    assert [group["weight_decay"] for group in after] == [0.0, 0.1, 0.2]
    for step, groups_then in enumerate(seen.seen):
        assert [group["lr"] for group in groups_then] == pytest.approx([r / (1 + step) for r in (1e-2, 1e-2, 1e-3)])
    assert clipped.seen[-1] == pytest.approx(0.01, rel=1e-3)
    assert moments.seen == [[STEPS - CUT] * len(pairs)]


@pytest.mark.parametrize("lora_first", [True, False])
def test_recovery_beside_it_sets_the_rate(lora_first: bool) -> None:
    spy = Spy(lambda trainer, _: [g["lr"] for g in trainer.optimizers[0].param_groups], "on_before_optimizer_step")
    beside = [LoRARecovery(r=2), Recovery(lr=0.3)]
    fit(Plain(), [spy, *parts()[:2], *(beside if lora_first else beside[::-1])], batches(STEPS), STEPS)
    assert spy.seen == [[0.05]] * CUT + [[0.3]] * (STEPS - CUT)


class ByHand(Plain):
    """Manual optimization with two optimizers, and a part outside the language model."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bias = nn.Parameter(torch.zeros(64))

    def configure_optimizers(self) -> Any:
        layers = list(self.lm.model.layers.parameters())
        inside = set(layers)
        rest = [parameter for parameter in self.parameters() if parameter not in inside]
        return [AdamW(rest, lr=1e-2), AdamW(layers, lr=1e-2)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.lm(**batch, use_cache=False)
        loss = nn.functional.cross_entropy((output.logits + self.bias).flatten(0, 1), batch["labels"].flatten())
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_several_optimizers_and_what_is_outside_the_model() -> None:
    look: Any = lambda _, module: weights(module)  # noqa: E731
    start, end = Spy(look, "on_train_batch_start"), at_the_end(look)
    # Two optimizers step in each batch, and Lightning counts both.
    callbacks = [end, RandomSelector(drop=3), StructuredCut(at=4, validate=False), LoRARecovery(r=2), start]
    fit(ByHand(), callbacks, batches(5), 10)
    (last,), at_cut = end.seen, start.seen[2]
    moved = {name for name in last if not torch.equal(last[name], at_cut[name])}
    assert moved == {name for name in last if is_adapter(name)} | {"bias"}


def test_adapters_come_after_the_last_cut() -> None:
    spy = before_each_step()
    callbacks = [
        BlockInfluenceSelector(drop=1, stop=1),
        StructuredCut(at=1, validate=False),
        BlockInfluenceSelector(drop=2, start=2, stop=3),
        StructuredCut(at=3, validate=False),
        LoRARecovery(r=2, target_modules=["v_proj"]),
        spy,
    ]
    fit(Plain(), callbacks, batches(STEPS), STEPS)
    counts = [sum(map(is_adapter, seen)) for seen in spy.seen]
    assert counts == [0, 0, 0, 2 * 3, 2 * 3]


@pytest.mark.parametrize(
    ("precision", "adapter"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_precision(precision: Any, adapter: torch.dtype, tmp_path: Path) -> None:
    look: Any = lambda _, module: weights(module)  # noqa: E731
    end, start = at_the_end(look), Spy(look, "on_train_batch_start")
    callbacks = [end, *parts(), ExportHF(str(tmp_path / "pruned")), start]
    fit(
        Plain(optimizer=adam),
        callbacks,
        batches(2 * STEPS),
        STEPS,
        precision=precision,
        accumulate_grad_batches=2,
        **({"gradient_clip_val": 1.0} if precision == "bf16-mixed" else {}),
    )
    (last,), at_cut = end.seen, start.seen[2 * CUT]
    assert {w.dtype for name, w in last.items() if is_adapter(name)} == {adapter}
    moved = {name for name in last if not torch.equal(last[name], at_cut[name])}
    assert moved == {name for name in last if is_adapter(name)}
    assert (tmp_path / "pruned" / "config.json").is_file()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_alone(training: bool) -> None:
    """Also on a model that is left in eval mode, as `from_pretrained` gives it."""

    def run(dropout: float) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        losses = Spy(lambda trainer, _: float(trainer.callback_metrics["loss"]), "on_train_batch_end")
        unmerged = at_the_end(lambda _, module: logits(lm_of(module)))
        module = Plain(tiny_lm().train(training), optimizer=adam)
        step = module.training_step
        module.training_step = lambda *args: logged(module, step(*args))  # type: ignore[method-assign]
        fit(module, [unmerged, *parts(LoRARecovery(r=2, dropout=dropout)), losses], batches(STEPS), STEPS)
        torch.testing.assert_close(logits(module.lm), unmerged.seen[0], rtol=1e-4, atol=1e-4)
        return losses.seen, unmerged.seen[0]

    def logged(module: L.LightningModule, loss: Tensor) -> Tensor:
        module.log("loss", loss)
        return loss

    (without, plain), (withal, dropped) = run(0.0), run(0.9)
    # B is 0 in the first step after the cut.
    assert [a == b for a, b in zip(without, withal, strict=True)] == [True] * (CUT + 1) + [False] * (STEPS - CUT - 1)
    assert not torch.equal(plain, dropped)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q_proj"], ["self_attn.q_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        (["v_proj", "mlp.down_proj"], ["mlp.down_proj", "self_attn.v_proj"]),
    ],
)
def test_target_modules(names: Any, expected: list[str]) -> None:
    spy = at_the_end(lambda _, module: weights(lm_of(module)))
    fit(Plain(), [spy, *parts(LoRARecovery(target_modules=names))], batches(STEPS), STEPS)
    adapted = {name.split(".", 3)[3].split(".lora_")[0] for name in spy.seen[0] if is_adapter(name)}
    assert sorted(adapted) == expected


class NoStep(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("training began")


def refused(*callbacks: Callback) -> str:
    """The one sentence."""
    module = NoStep()
    before = weights(module)
    with pytest.raises(ConfigError) as error:
        fit(module, callbacks, batches(1), 9)
    assert_equal(weights(module), before)
    assert "configure_model" not in vars(module)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, ["LoRARecovery.r is 0", "at least 1"]),
        ({"alpha": -2}, ["LoRARecovery.alpha is -2", "at least 1"]),
        ({"dropout": 1.0}, ["LoRARecovery.dropout is 1.0", "below 1"]),
        ({"dropout": -0.1}, ["LoRARecovery.dropout is -0.1"]),
        ({"seed": -1}, ["LoRARecovery.seed is -1", "at least 0"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["'lm_head'", "self_attn.q_proj", "all-linear"]),
        ({"target_modules": ["proj"]}, ["'proj'"]),
        ({"target_modules": []}, ["target_modules", "is empty"]),
        ({"target_modules": "input_layernorm"}, ["'input_layernorm'"]),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: list[str]) -> None:
    message = refused(*parts(LoRARecovery(**settings)))
    assert all(word in message for word in words), message


def test_without_a_cut() -> None:
    message = refused(RandomSelector(drop=1), LoRARecovery())
    assert "LoRARecovery" in message
    assert "StructuredCut" in message


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightprune.recovery.lora.find_spec", lambda name: None)
    assert "lightprune[lora]" in refused(*parts())


def test_a_checkpoint_is_validated_and_exported_merged(tmp_path: Path) -> None:
    module, path = Plain(optimizer=adam), tmp_path / "end.ckpt"
    unmerged = at_the_end(lambda trainer, module: (logits(lm_of(module)), trainer.save_checkpoint(path)))
    fit(module, [unmerged, *parts()], batches(STEPS), STEPS)
    expected = unmerged.seen[0][0]

    fresh = Plain()
    trainer = trainer_for(parts(), STEPS)
    (found,) = trainer.validate(fresh, batches(1), ckpt_path=path, weights_only=True, verbose=False)
    data = batches(1)[0]
    assert found["val/loss"] == pytest.approx(float(module.lm.eval()(**data).loss.detach()), rel=1e-5)
    torch.testing.assert_close(logits(fresh.lm), expected, rtol=1e-4, atol=1e-4)
    assert weights(fresh).keys() == weights(module).keys()

    stranger = Plain()
    exporter = PruningTrainer(
        callbacks=parts(), accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        max_steps=STEPS,
    )  # fmt: skip
    exporter.export(stranger, str(path), str(tmp_path / "pruned"), weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
    assert len(PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json").kept_layers) == 3
