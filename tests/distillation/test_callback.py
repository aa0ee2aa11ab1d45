"""`Distillation` in a fit: its loss against a plain computation, and all that a run does to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lightprune as lp
from lightprune import ConfigError, Distillation
from tests.families import left_padded, tiny_lm
from tests.resume_run import Shuffled
from tests.training import Batch, Batches, Plain, assert_equal, batches, fit, gradients, trainer_for, weights

FAMILIES = ("llama", "granite", "gemma2", "gpt2", "opt", "qwen3_moe")


def labelled(count: int = 3) -> list[Batch]:
    """Batches with padding on the left, which has no labels."""
    found = []
    for seed in range(count):
        batch = left_padded(seed=seed)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(batch | {"labels": labels})
    return found


def plain_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 KL, the mean over the tokens that have a label."""
    p = (teacher[:, :-1] / temperature).softmax(-1)
    q = (student[:, :-1] / temperature).log_softmax(-1)
    each = (p * (p.clamp(min=1e-30).log() - q)).sum(-1)
    counted = labels[:, 1:] != -100
    return temperature**2 * each[counted].mean()


class Gradients(Callback):
    """The gradients of every step, as the optimizer finds them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(gradients(module))


def other_lm(family: str = "llama", seed: int = 1) -> PreTrainedModel:
    return tiny_lm(family, num_layers=3, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.4, 2.0)])
def test_the_gradient_is_that_of_the_plain_formula(
    family: str, alpha: float, temperature: float, tmp_path: Path
) -> None:
    teacher = other_lm(family, seed=7)
    teacher.save_pretrained(tmp_path / "teacher")
    (batch,) = labelled(1)
    spy = Gradients()
    part = Distillation(alpha=alpha, temperature=temperature, teacher=str(tmp_path / "teacher"))
    module = Plain(other_lm(family))
    fit(module, [spy, part], [batch], max_steps=1)

    expected = Plain(other_lm(family)).train()
    output = expected.lm(**batch, use_cache=False)
    with torch.no_grad():
        theirs = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    loss = (1 - alpha) * output.loss + alpha * plain_divergence(output.logits, theirs, batch["labels"], temperature)
    loss.backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(spy.seen[0][name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_teaches_itself_learns_nothing_until_it_is_cut() -> None:
    spy, module = Gradients(), Plain(other_lm())
    before = weights(module)
    fit(module, [spy, Distillation(alpha=1.0)], labelled(2), max_steps=2)
    assert max(float(g.abs().max()) for g in spy.seen[0].values()) < 1e-6
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def test_after_the_cut_the_uncut_model_teaches() -> None:
    module, dense = Plain(), tiny_lm()
    selector, spy = lp.RandomSelector(drop=2), Gradients()
    fit(module, [spy, Distillation(alpha=1.0), selector, lp.StructuredCut(at=1)], labelled(3), max_steps=2)
    (batch,) = labelled(2)[1:]
    cut = Plain(tiny_lm())
    lp.surgery.cut_model(lp.anatomy_of(cut.lm), selector.plan)
    with torch.no_grad():
        theirs = dense.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    cut.train()
    plain_divergence(cut.lm(**batch, use_cache=False).logits, theirs, batch["labels"], 1.0).backward()
    # Before the cut the model was its own teacher, and has not moved.
    for name, gradient in gradients(cut).items():
        torch.testing.assert_close(spy.seen[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_accumulated_batches_weigh_the_same() -> None:
    def run(accumulate: int, data: list[Batch]) -> dict[str, Tensor]:
        module = Plain()
        parts = [Distillation(alpha=0.5), lp.RandomSelector(drop=2), lp.StructuredCut(at=0)]
        fit(module, parts, data, max_steps=1, accumulate_grad_batches=accumulate)
        return weights(module)

    whole, parted = batches(1, batch=4), batches(1, batch=4)[0]
    halves = [{name: value[rows] for name, value in parted.items()} for rows in (slice(0, 2), slice(2, 4))]
    for name, weight in run(2, halves).items():
        torch.testing.assert_close(weight, run(1, list(whole))[name], rtol=1e-4, atol=1e-6)


class ByHand(Plain):
    """Calls decoder and head by itself."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = self.lm.model(input_ids=batch["input_ids"], use_cache=False)[0]
        logits = self.lm.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Tuples(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.lm(**batch, use_cache=False, return_dict=False)[0]


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.lm(**batch, use_cache=False).loss)
        optimizer.step()


@pytest.mark.parametrize("kind", [ByHand, Tuples, Manual])
def test_in_a_strangers_module(kind: Callable[[], Plain]) -> None:
    def run(module: Plain) -> dict[str, Tensor]:
        parts = [Distillation(alpha=0.7), lp.RandomSelector(drop=2), lp.StructuredCut(at=0)]
        fit(module, parts, batches(3), max_steps=3)
        return weights(module)

    expected = run(Plain())
    for name, weight in run(kind()).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


class Headless(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = self.lm.model(input_ids=batch["input_ids"], use_cache=False)[0]
        return self.lm.lm_head(hidden[:, -1]).square().mean()


def test_a_step_without_logits_is_refused() -> None:
    parts = [Distillation(), lp.RandomSelector(drop=2), lp.StructuredCut(at=0)]
    with pytest.raises(ConfigError, match=r"no logits \[B, T, V\] in a step of Headless"):
        fit(Headless(), parts, batches(1), max_steps=1)


def parts_of(folder: Path, snapshot: int | str) -> list[Callback]:
    return [
        Distillation(alpha=0.5, snapshot=snapshot, hidden=0.1, top_k=8),
        lp.BlockInfluenceSelector(drop=2, start=4, stop=6),
        lp.GateAnnealing(),
        lp.StructuredCut(at=8),
        lp.Recovery(lr=2e-3),
        ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0),
        lp.ExportHF(str(folder / "hf")),
    ]


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("snapshot", [0, 3, "25%"])
@pytest.mark.parametrize("stopped", [2, 5, 7, 10])
def test_resumed_it_ends_as_if_undisturbed(tmp_path: Path, snapshot: int | str, stopped: int) -> None:
    def run(folder: Path, *others: Callback, ckpt_path: str | None = None) -> Plain:
        module = Plain()
        trainer = trainer_for(
            [*others, *parts_of(folder, snapshot)], 12, enable_checkpointing=True, default_root_dir=folder
        )
        trainer.fit(module, Shuffled(12), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "again", Stop(stopped))
    again = run(tmp_path / "again", ckpt_path="last")
    assert_equal(weights(whole), weights(again))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "hf")
    assert exported.config.num_hidden_layers == 4
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "teacher" in name]
    (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("Distillation")]
    assert (state["weights"] is None) == (snapshot == 0)


def test_another_teacher_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    def run(lm: PreTrainedModel, *others: Callback, ckpt_path: str | None = None) -> None:
        trainer = trainer_for([*others, *parts_of(tmp_path, 0)], 12, enable_checkpointing=True)
        trainer.fit(Plain(lm), Shuffled(12), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)

    with pytest.raises(InterruptedError):
        run(tiny_lm(), Stop(10))
    with pytest.raises(ConfigError, match="other weights than that of the checkpoint"):
        run(tiny_lm(seed=9), ckpt_path="last")


def test_hidden_states_at_the_borders() -> None:
    """The penalty of a cut in depth and in hidden dimensions, from states that are computed independently."""
    from dataclasses import replace

    from lightprune.plan import PruningPlan
    from lightprune.surgery import cut_model

    dense = tiny_lm()
    anatomy = lp.anatomy_of(dense)
    plan = PruningPlan.of(anatomy, layers=[0, 1, 4, 5], hidden=list(range(0, 32, 2)))
    assert replace(anatomy.shape, layers=4, hidden=16) == plan.shape
    small = tiny_lm()
    cut_model(lp.anatomy_of(small), plan)
    (batch,) = labelled(1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        # `hidden_states[i]` enters layer i.
        theirs = dense.eval()(**inputs, output_hidden_states=True).hidden_states[4][..., ::2]
        ours = small.eval()(**inputs, output_hidden_states=True).hidden_states[2]
        apart = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
        counted = batch["labels"][:, 1:] != -100
        expected = apart[:, :-1][counted].mean()

    from lightprune.distillation.callback import relative_distance

    found = relative_distance(
        ours, dense(**inputs, output_hidden_states=True).hidden_states[4].detach(), list(plan.kept("hidden", 0))
    )
    torch.testing.assert_close(found[:, :-1][counted].mean(), expected)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alpha": 0.0}, "Distillation.alpha is 0.0"),
        ({"alpha": 1.5}, "Distillation.alpha is 1.5"),
        ({"temperature": 0}, "Distillation.temperature is 0"),
        ({"top_k": 0}, "Distillation.top_k is 0"),
        ({"top_k": 1000}, r"top_k is 1000, and the vocabulary has 64 tokens"),
        ({"snapshot": 3}, r"snapshot is 3, after the cut at step 2"),
        ({"start": 2, "stop": 2}, "Distillation.stop is 2"),
        ({"teacher": "nowhere/at-all", "snapshot": 1}, "set one of the two"),
        ({"dtype": "int7"}, "dtype 'int7' is unknown"),
    ],
)
def test_refused_before_the_first_step(settings: dict[str, Any], sentence: str) -> None:
    module = Plain()
    before = weights(module)
    parts = [Distillation(**settings), lp.RandomSelector(drop=2), lp.StructuredCut(at=2)]
    with pytest.raises(ConfigError, match=sentence):
        fit(module, parts, batches(4), max_steps=4)
    assert_equal(weights(module), before)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = tiny_lm()
    other.resize_token_embeddings(80)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="vocabulary has 80 tokens, and the model's has 64"):
        fit(Plain(), [Distillation(teacher=str(tmp_path / "other"))], batches(1), max_steps=1)


def test_learned_gates_learn_from_the_teacher() -> None:
    """While weights are held, the gates' loss is the divergence: it is zero at first, and then the l1 moves them."""
    selector = lp.LayerGateSelector(drop=2, steps_per_round=3, rounds=1, l1=0.1)
    parts = [Distillation(), selector, lp.StructuredCut()]
    module = Plain()
    fit(module, parts, batches(6), max_steps=6)
    assert module.lm.config.num_hidden_layers == 4


def test_with_lora_and_reweighting_the_teacher_leaves_no_trace(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    module = Plain()
    parts = [
        Distillation(alpha=0.5),
        lp.RandomSelector(drop=2),
        lp.StructuredCut(at=1),
        lp.LoRARecovery(r=2),
        lp.Recovery(lr=1e-2),
        lp.ExportHF(str(tmp_path / "hf")),
    ]
    fit(module, parts, Batches(batches(4)), max_steps=4)
    names = set(module.state_dict())
    assert names == set(Plain(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).state_dict())
    assert all(not hook for child in module.modules() for hook in (child._forward_hooks, child._forward_pre_hooks))
