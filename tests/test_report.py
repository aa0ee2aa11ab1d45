"""`RunReport`: its counts against counts by hand, in runs with and without pruning."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightprune import GreedyPerplexitySelector, PruningPlan, RandomSelector, StructuredCut
from lightprune.callbacks.run_report import RunReport, write_summary

BATCHES, BATCH, LENGTH, PADDING = 6, 2, 8, 3


class Stranger(pl.LightningModule):
    """A module that knows nothing of lightprune and names its own metrics."""

    def __init__(self, *, mask: Literal["by name", "by position"] | None = "by name") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.backbone = LlamaForCausalLM(
            LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        mask = torch.ones_like(batch)
        mask[:, -PADDING:] = 0
        if self.mask == "by position":
            return self.backbone(batch, mask, labels=batch).loss
        arguments = {"attention_mask": mask} if self.mask == "by name" else {}
        return self.backbone(batch, labels=batch, **arguments).loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("my_metric", self.backbone(batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        rows = torch.randint(32, (BATCHES * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
        return DataLoader(list(rows), batch_size=BATCH)

    val_dataloader = train_dataloader


def trainer(root: Path, *callbacks: Callback, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "default_root_dir": root,
            "max_steps": BATCHES,
            "accelerator": "cpu",
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **kwargs,
        }
    )


def summary(root: Path, name: str = "summary.json") -> dict[str, Any]:
    return json.loads((root / name).read_text())


def test_counts_of_a_run_with_a_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Stranger()
    before = sum(p.numel() for p in module.backbone.parameters())
    layer = sum(p.numel() for p in module.backbone.model.layers[0].parameters())
    cut = StructuredCut(at=4)
    trainer(tmp_path, RandomSelector(drop=2), cut, RunReport()).fit(module)

    found = summary(tmp_path)
    counts = {"layers": 4, "hidden": 8, "heads": 2, "kv_groups": 2, "head_dim": 4, "channels": 16}
    assert found["before"] == counts | {"parameters": before}
    assert found["after"] == counts | {"layers": 2, "parameters": before - 2 * layer}
    assert found["dropped_layers"] == list(cut.plan.dropped_layers)
    assert PruningPlan.from_dict(found["plan"]) == cut.plan
    assert (found["cut_steps"], found["steps"]) == ([4], BATCHES)
    tokens = {phase: cost["tokens"] for phase, cost in found["phases"].items()}
    per_step = BATCH * (LENGTH - PADDING)
    assert tokens == {"transfer": 4 * per_step, "recover": 2 * per_step, "validation": 0}
    assert all(cost["seconds"] > 0 for cost in found["phases"].values())
    assert list(found["metrics"]) == ["start", "before_cut", "after_cut", "end"]
    assert found["metrics"]["after_cut"] == cut.metrics["after"]
    assert "Cut at step 4; layers dropped" in capsys.readouterr().out


def test_a_search_on_a_batch_reads_no_more_of_the_data(tmp_path: Path) -> None:
    trainer(tmp_path, RunReport(), GreedyPerplexitySelector(drop=2, stop=2), StructuredCut(at=4)).fit(Stranger())
    tokens = {phase: cost["tokens"] for phase, cost in summary(tmp_path)["phases"].items()}
    per_step = BATCH * (LENGTH - PADDING)
    assert tokens == {"select": 2 * per_step, "transfer": 2 * per_step, "recover": 2 * per_step, "validation": 0}


def test_the_first_batch_may_be_of_a_later_phase(tmp_path: Path) -> None:
    trainer(tmp_path, RunReport(), RandomSelector(drop=2), StructuredCut(at=0)).fit(Stranger())
    assert set(summary(tmp_path)["phases"]) == {"recover", "validation"}


def test_metrics_are_those_of_the_moment(tmp_path: Path) -> None:
    """Start and end against the trainer's own validation of the same weights."""
    module = Stranger()
    validator = trainer(tmp_path)
    start = validator.validate(module, verbose=False)[0]
    trainer(tmp_path, RunReport()).fit(module)
    end = validator.validate(module, verbose=False)[0]
    assert summary(tmp_path)["metrics"] == {"start": pytest.approx(start), "end": pytest.approx(end)}
    assert start != end


def test_without_a_mask_every_token_counts(tmp_path: Path) -> None:
    trainer(tmp_path, RunReport()).fit(Stranger(mask=None))
    assert summary(tmp_path)["phases"]["train"]["tokens"] == BATCHES * BATCH * LENGTH


def test_a_mask_may_come_by_position(tmp_path: Path) -> None:
    trainer(tmp_path, RunReport()).fit(Stranger(mask="by position"))
    assert summary(tmp_path)["phases"]["train"]["tokens"] == BATCHES * BATCH * (LENGTH - PADDING)


class OwnLoss(Stranger):
    """Computes its loss without a call of the language model."""

    def __init__(self, *, embeds: bool) -> None:
        super().__init__()
        self.embeds = embeds

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        lm = self.backbone
        states = lm.model(inputs_embeds=lm.get_input_embeddings()(batch)) if self.embeds else lm.model(batch)
        logits = lm.lm_head(states.last_hidden_state[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("cuts", [False, True])
def test_a_loss_may_be_made_without_a_call_of_the_model(cuts: bool, embeds: bool, tmp_path: Path) -> None:
    parts = [RandomSelector(drop=2), StructuredCut(at=0)] if cuts else []
    trainer(tmp_path, RunReport(), *parts).fit(OwnLoss(embeds=embeds))
    phases = summary(tmp_path)["phases"]
    assert phases["recover" if cuts else "train"]["tokens"] == BATCHES * BATCH * LENGTH


def test_module_without_language_model_and_without_validation(tmp_path: Path) -> None:
    module = BoringModel()
    trainer(tmp_path, RunReport(), limit_val_batches=0).fit(module)
    found = summary(tmp_path)
    assert found["before"] == found["after"] == {"parameters": 32 * 2 + 2}
    assert found["metrics"] == {}
    assert found["dropped_layers"] is None
    assert list(found["phases"]) == ["train"]


def test_validation_at_the_start_can_be_left_out(tmp_path: Path) -> None:
    trainer(tmp_path, RunReport(validate_at_start=False)).fit(Stranger())
    assert list(summary(tmp_path)["metrics"]) == ["end"]


def test_resume_goes_on_counting(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    trainer(once, RandomSelector(drop=1), StructuredCut(at=4), RunReport()).fit(Stranger())
    saver = ModelCheckpoint(twice, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    first = trainer(twice, RandomSelector(drop=1), StructuredCut(at=4), RunReport(), saver, max_steps=5)
    first.fit(Stranger())
    second = trainer(twice, RandomSelector(drop=1), StructuredCut(at=4), RunReport())
    second.fit(Stranger(), ckpt_path=twice / "step=5.ckpt")

    expected, found = summary(once), summary(twice)
    for phase in ("transfer", "recover"):
        assert found["phases"][phase]["tokens"] == expected["phases"][phase]["tokens"]
    for key in ("before", "after", "dropped_layers", "cut_steps"):
        assert found[key] == expected[key]
    for moment in ("start", "before_cut", "after_cut"):
        assert found["metrics"][moment] == expected["metrics"][moment]
    assert found["phases"]["transfer"]["seconds"] == summary(twice, "summary.1.json")["phases"]["transfer"]["seconds"]


def test_an_interrupted_fit_goes_on_counting(tmp_path: Path) -> None:
    class Fails(Stranger):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if self.global_step == 2 and not self.failed:
                self.failed = True
                raise RuntimeError("no luck")
            return super().training_step(batch, batch_idx)

        failed = False

    again, module = trainer(tmp_path, RunReport(), max_steps=4), Fails(mask=None)
    with pytest.raises(RuntimeError, match="no luck"):
        again.fit(module)
    assert not module.backbone._forward_pre_hooks
    again.fit(module)
    assert summary(tmp_path)["phases"]["train"]["tokens"] == 4 * BATCH * LENGTH


def test_another_trainer_counts_from_the_beginning(tmp_path: Path) -> None:
    report, module = RunReport(), Stranger()
    for run in ("one", "two"):
        trainer(tmp_path / run, RandomSelector(drop=1), StructuredCut(at=2), report).fit(module)
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert two["before"] == one["after"]
    assert {phase: of["tokens"] for phase, of in two["phases"].items()} == {
        phase: of["tokens"] for phase, of in one["phases"].items()
    }


def test_reporting_does_not_change_the_run(tmp_path: Path) -> None:
    class Draws(Callback):
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.drawn.append(torch.rand(()).item())

    runs = []
    for callbacks in ([], [RunReport()]):
        module, draws = Stranger(), Draws()
        pl.seed_everything(3)
        trainer(tmp_path, *callbacks, draws).fit(module)
        runs.append((draws.drawn, module.state_dict()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_state_loads_with_weights_only(tmp_path: Path) -> None:
    report = RunReport()
    trainer(tmp_path, report).fit(Stranger())
    torch.save(report.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == report.state_dict()


def test_leaves_no_hook(tmp_path: Path) -> None:
    module = Stranger()
    trainer(tmp_path, RunReport()).fit(module)
    assert not module.backbone._forward_pre_hooks


def test_older_summaries_are_kept(tmp_path: Path) -> None:
    for run in range(3):
        write_summary({"run": run}, tmp_path)
    found = {path.name: json.loads(path.read_text())["run"] for path in tmp_path.iterdir()}
    assert found == {"summary.1.json": 0, "summary.2.json": 1, "summary.json": 2}


def test_infinities_are_null(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = write_summary({"a": {"b": [float("inf"), float("nan"), 1.5]}}, tmp_path)
    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": {"b": [None, None, 1.5]}}
