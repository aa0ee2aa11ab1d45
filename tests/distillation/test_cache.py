"""`Distillation.cache`: a run that finds the teacher's answers is the run that asks for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightprune as lp
from lightprune import ConfigError, Distillation
from lightprune.distillation.teacher import Teacher
from tests.families import tiny_lm
from tests.training import Batch, Plain, assert_equal, batches, fit, trainer_for, weights


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The sequences of every pass of a teacher; the cache is the test's own."""
    monkeypatch.setenv("LIGHTPRUNE_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    original = Teacher.hidden_states

    def counted(self: Teacher, inputs: dict[str, Tensor], layers: object = ()) -> object:
        seen.append(len(inputs["input_ids"]))
        return original(self, inputs, layers)  # type: ignore[arg-type]

    monkeypatch.setattr(Teacher, "hidden_states", counted)
    return seen


def run(
    make: Callable[[], Plain] = Plain,
    data: list[Batch] | None = None,
    *,
    cache: bool = True,
    top_k: int = 5,
    temperature: float = 1.0,
    steps: int = 4,
) -> dict[str, Tensor]:
    module = make()
    taught = Distillation(alpha=0.7, top_k=top_k, temperature=temperature, cache=cache)
    fit(module, [taught, lp.RandomSelector(drop=2), lp.StructuredCut(at=0)], data or batches(4), max_steps=steps)
    return weights(module)


def test_the_second_pass_runs_no_teacher_and_is_the_same(passes: list[int]) -> None:
    plain = run(cache=False)
    asked = len(passes)
    first = run()
    assert len(passes) == 2 * asked == 8
    second = run()
    assert len(passes) == 8
    assert_equal(first, plain)
    assert_equal(second, plain)


def test_a_second_epoch_runs_no_teacher(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightprune.distillation.cache.ROWS_A_FILE", 2)
    data = batches(2)
    module = Plain()
    parts = [Distillation(top_k=5, cache=True), lp.RandomSelector(drop=2), lp.StructuredCut(at=0)]
    fit(module, parts, data, max_steps=6, max_epochs=3)
    assert len(passes) == 2


@pytest.mark.parametrize("change", [{"top_k": 6}, {"temperature": 2.0}, {"make": lambda: Plain(tiny_lm(seed=3))}])
def test_other_settings_and_another_teacher_know_nothing(change: dict[str, object], passes: list[int]) -> None:
    run()
    run(**change)  # type: ignore[arg-type]
    assert len(passes) == 8
    expected = run(**change, cache=False)  # type: ignore[arg-type]
    assert_equal(run(**change), expected)  # type: ignore[arg-type]


def test_sequences_are_found_in_other_batches(passes: list[int]) -> None:
    data = batches(4)
    run(data=data)
    rows = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    size = len(data[0]["input_ids"])
    order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(0))
    mixed = [{name: value[order][i * size : (i + 1) * size] for name, value in rows.items()} for i in range(4)]
    del passes[:]
    found = run(data=mixed)
    assert not passes
    torch.testing.assert_close(found, run(data=mixed, cache=False), rtol=1e-4, atol=1e-6)


class Reversed(Plain):
    """Calls the model with other tokens than those of the batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step({name: value.flip(0) for name, value in batch.items()}, batch_idx)


class ByHand(Plain):
    """Calls decoder and head by itself, so that the logits are the head's."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.lm.lm_head(self.lm.model(input_ids=batch["input_ids"], use_cache=False)[0])
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("make", [Reversed, ByHand])
def test_what_is_not_the_batchs_own_call_is_asked_for(make: Callable[[], Plain], passes: list[int]) -> None:
    run()  # the very sequences are known
    del passes[:]
    found = run(make)
    assert len(passes) == 4
    assert_equal(found, run(make, cache=False))


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def parts() -> list[lp.pipeline.PruningCallback]:
        return [Distillation(top_k=5, cache=True), lp.RandomSelector(drop=2), lp.StructuredCut(at=0)]

    whole, first, second = Plain(), Plain(), Plain()
    fit(whole, parts(), batches(4), max_steps=4)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="middle")
    fit(first, [*parts(), saver], batches(4)[:2], max_steps=2, enable_checkpointing=True)
    trainer = trainer_for(parts(), 4, max_epochs=2)
    trainer.fit(second, batches(4)[2:], ckpt_path=str(tmp_path / "middle.ckpt"), weights_only=True)
    assert_equal(weights(second), weights(whole))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "top_k"),
        ({"top_k": 5, "hidden": 1.0}, "hidden"),
        ({"top_k": 5, "snapshot": 1}, "snapshot"),
        ({"top_k": 5, "cache": "yes"}, "true or false"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: dict[str, object], named: str) -> None:
    part = Distillation(**{"cache": True, **settings})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"Distillation\.cache is .*{named}"):
        fit(Plain(), [part, lp.RandomSelector(drop=2), lp.StructuredCut(at=1)], batches(2), max_steps=2)
