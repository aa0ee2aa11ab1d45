import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightprune.data import DomainCounts, Source, TextDataModule
from tests.data.conftest import byte_tokenizer
from tests.training import Plain, batches, fit


class Counter(pl.LightningModule):
    """Counts by itself the tokens that it sees of each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokens = torch.zeros(2)
        self.at_step: dict[int, list[float]] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        for tokens, domain in zip(batch["input_ids"], batch["domain"], strict=True):
            self.tokens[domain] += len(tokens)
        self.at_step[self.global_step + 1] = self.tokens.tolist()
        return self.weight * 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kept(CSVLogger):
    """A logger that also keeps what it is given."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows[step or 0] = self.rows.get(step or 0, {}) | metrics


def run(tmp_path: Path, counts: DomainCounts | None = None, **options: Any) -> tuple[Counter, Kept]:
    domains = {}
    for name, documents in (("small", 6), ("large", 60)):
        path = tmp_path / f"{name}.txt"
        path.write_text("|".join(f"{name[0]}{i:06d}" for i in range(documents)))
        domains[name] = Source(files=str(path), separator="|")
    data = TextDataModule(
        domains,
        byte_tokenizer(),
        block_size=8,
        batch_size=2,
        weights={"small": 1, "large": 1},
        validation=1,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    module, logger = Counter(), Kept(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=11,
        callbacks=[counts or DomainCounts()],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **{"log_every_n_steps": 4, **options},
    )
    trainer.fit(module, datamodule=data)
    return module, logger


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_is_logged_is_what_the_module_has_seen(tmp_path: Path, accumulate: int) -> None:
    module, logger = run(tmp_path, accumulate_grad_batches=accumulate)
    rows = {step: row for step, row in logger.rows.items() if "data/tokens/small" in row}
    assert list(rows) == [4, 8, 11]
    for step, row in rows.items():
        seen = module.at_step[step]
        assert [row["data/tokens/small"], row["data/tokens/large"]] == seen
        assert row["data/epochs/small"] == pytest.approx(seen[0] / (5 * 8))
        assert row["data/epochs/large"] == pytest.approx(seen[1] / (59 * 8))


def test_the_same_callback_in_a_second_run(tmp_path: Path) -> None:
    counts = DomainCounts()
    logged = [list(run(tmp_path, counts)[1].rows) for _ in range(2)]
    assert logged == [[4, 8, 11]] * 2


def test_a_domain_that_is_repeated_often_is_named_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module, _ = run(tmp_path, accumulate_grad_batches=5)
    assert module.tokens[0] > 4 * 5 * 8
    named = [str(warning.message) for warning in found if "passed over domain" in str(warning.message)]
    assert len(named) == 1
    assert named[0].startswith("Training has passed over domain 'small' more than 4 times")


def test_other_data_is_left_alone() -> None:
    fit(Plain(), [DomainCounts()], batches(2), max_steps=2)


def test_a_trainer_that_logs_at_no_step(tmp_path: Path) -> None:
    _, logger = run(tmp_path, log_every_n_steps=0)
    assert list(logger.rows) == [11]  # the end alone
