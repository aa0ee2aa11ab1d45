"""Projected gates: in every step the model of the shape that is asked for, and slopes that go straight through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightprune as lp
from lightprune import ConfigError, ProjectedGateSelector
from lightprune.anatomy import anatomy_of
from lightprune.importance.ranking import highest, highest_heads, highest_heads_mask, highest_mask, of_groups
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.selectors.width.projected_gates import ranks
from tests.families import tiny_lm
from tests.resume_run import Shuffled
from tests.training import Batch, Plain, Spy, batches, fit, trainer_for

COUNTS: dict[str, Any] = {"heads": 2, "kv_groups": 1, "channels": 20}


def test_the_masks_open_what_the_rankings_keep() -> None:
    generator = torch.Generator().manual_seed(0)
    target = anatomy_of(tiny_lm()).shape
    for count in (1, 3, 7):
        scores = torch.randint(0, 5, (4, 8), generator=generator).float()  # with equal ones
        opened = [row.nonzero().flatten().tolist() for row in highest_mask(scores, count)]
        assert opened == [highest(row, count) for row in scores]
    for groups, heads in ((1, 2), (2, 2), (1, 1)):
        kept = type(target)(**{**vars(target), "kv_groups": groups, "heads": heads})
        scores = torch.rand(4, 4, generator=generator)
        opened = [row.nonzero().flatten().tolist() for row in highest_heads_mask(scores, 2, kept)]
        assert opened == [highest_heads(row, of_groups(row, 2), kept) for row in scores]


def test_ranks_are_shares_of_the_layer() -> None:
    assert ranks(torch.tensor([[3.0, 1.0, 2.0, 9.0]])).tolist() == [[0.5, 0.0, 0.25, 0.75]]


def opened(part: ProjectedGateSelector, lm: Any) -> PruningPlan:
    """The plan that keeps what is open now."""
    kept = {unit: [row.nonzero().flatten().tolist() for row in mask] for unit, mask in part._open.items()}
    return PruningPlan.of(anatomy_of(lm), **kept)


class Losses(Plain):
    def __init__(self, part: ProjectedGateSelector) -> None:
        super().__init__(tiny_lm("llama_tied"))
        self.part = part
        self.seen: list[tuple[float, float, PruningPlan | None]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        plan = opened(self.part, self.lm) if self.part._open else None
        if plan is not None:
            whole = tiny_lm("llama_tied")
            with torch.no_grad(), masked(anatomy_of(whole), plan):
                self.seen.append((float(loss), float(whole(**batch, use_cache=False).loss), plan))
        return loss


def test_every_step_is_one_of_the_shape_that_is_asked_for() -> None:
    part = ProjectedGateSelector(score_steps=2, stop=8, lr=0.3, **COUNTS)
    module = Losses(part)
    fit(module, [part, lp.StructuredCut(at=8)], batches(8), max_steps=8)
    assert len(module.seen) == 6
    for ours, expected, plan in module.seen:
        assert ours == pytest.approx(expected, rel=1e-5)
        assert (plan.shape.heads, plan.shape.kv_groups, plan.shape.channels) == (2, 1, 20)
    assert len({str(plan.kept_channels) for *_, plan in module.seen}) > 1
    assert part.plan is not None
    shape = anatomy_of(module.lm).shape
    assert (shape.heads, shape.kv_groups, shape.channels) == (2, 1, 20)


def test_the_first_choice_is_that_of_the_activations() -> None:
    gates = ProjectedGateSelector(score_steps=2, stop=3, **COUNTS)
    first: list[PruningPlan] = []

    def look(trainer: Any, module: Any) -> None:
        if gates._open:
            first.append(opened(gates, module.lm))

    fit(Plain(tiny_lm("llama_tied")), [gates, Spy(look, hook="on_train_batch_start")], batches(3), max_steps=3)
    scores = lp.ActivationUnitSelector(weighted=True, stop=2, **COUNTS)
    fit(Plain(tiny_lm("llama_tied")), [scores], batches(3), max_steps=2)
    assert scores.plan is not None
    assert first[0].kept_channels == scores.plan.kept_channels
    assert first[0].kept_heads == scores.plan.kept_heads


def test_a_step_follows_the_slopes_of_all_gates_open_and_closed() -> None:
    """Against gates that are written into a copy of the model by hand. Adam's first step is lr times the sign."""
    part = ProjectedGateSelector(score_steps=1, stop=3, lr=0.01, channels=20)
    data = batches(3)
    kept: list[Tensor] = []
    spy = Spy(lambda *_: kept.append(part._learned["channels"].detach().clone()) if part._learned else None)
    fit(Plain(tiny_lm("llama_tied")), [part, spy], data[:2], max_steps=2)
    (after,) = kept[-1:]
    lm = tiny_lm("llama_tied")
    scores = lp.ActivationUnitSelector(weighted=True, stop=1, channels=20)
    fit(Plain(lm), [scores], data[:1], max_steps=1)
    assert scores.plan is not None
    before = ranks(torch.tensor(scores.plan.provenance["scores"]["channels"]))
    lm = tiny_lm("llama_tied")
    gates = [torch.zeros(before.shape[1]) for _ in before]
    for layer, gate, channels in zip(lm.model.layers, gates, scores.plan.kept_channels or (), strict=True):
        gate[list(channels)] = 1
        gate.requires_grad_()
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, gate=gate: (args[0] * gate,))
    lm(**data[1], use_cache=False).loss.backward()
    slopes = torch.stack([gate.grad for gate in gates if gate.grad is not None])
    torch.testing.assert_close(after, before - 0.01 * slopes.sign(), rtol=0, atol=1e-4)


def test_learned_gates_lose_less_than_the_scores_that_they_begin_with() -> None:
    def loss_of(selector: lp.Selector, data: list[Batch], steps: int) -> float:
        module = Plain(tiny_lm("llama_tied"))
        fit(module, [selector, lp.StructuredCut(at=steps), lp.Distillation(alpha=1.0)], data, max_steps=steps)
        whole = tiny_lm("llama_tied").eval()
        with torch.no_grad():
            p, q = (lm(**data[0], use_cache=False).logits.log_softmax(-1) for lm in (whole, module.lm.eval()))
        return float((p.exp() * (p - q)).sum(-1).mean())

    data = list(batches(1, batch=4)) * 40
    learned = loss_of(ProjectedGateSelector(score_steps=2, stop=40, lr=0.05, channels=12), data, 40)
    scored = loss_of(lp.ActivationUnitSelector(weighted=True, stop=2, channels=12), data, 2)
    assert learned < 0.9 * scored


def test_resumed_in_the_window_it_chooses_the_same(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
        part = ProjectedGateSelector(score_steps=2, stop=6, lr=0.1, **COUNTS)
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = trainer_for([part, saver], 6, enable_checkpointing=True, default_root_dir=folder)
        trainer.fit(Plain(tiny_lm("llama_tied")), Shuffled(6), ckpt_path=checkpoint, weights_only=True)
        assert part.plan is not None
        return part.plan.to_dict()

    expected = run(tmp_path)
    for step in (1, 2, 4):
        (tmp_path / f"again{step}").mkdir()
        assert run(tmp_path / f"again{step}", tmp_path / f"step={step}.ckpt") == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden": 16}, r"is to cut hidden dimensions: it has gates for"),
        ({"channels": 20, "stop": 8}, r"stop is 8, and its gates begin to learn at step 8"),
        ({"channels": 20, "lr": 0.0}, r"ProjectedGateSelector\.lr"),
        ({"channels": 20, "score_steps": 0}, r"ProjectedGateSelector\.score_steps"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        fit(Plain(), [ProjectedGateSelector(**{"stop": 12, **settings})], batches(2), max_steps=12)
