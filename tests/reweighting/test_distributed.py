"""Two real processes: all ranks set the same weights, from the losses of all of them."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from lightprune.reweighting import DomainReweighting
from tests.reweighting.runs import DOMAINS, Stranger, fit, metrics_of, reweighting_of, text_data, write_texts


class Report(Callback):
    """Writes down what a rank knows at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = list(reweighting_of(trainer).history)
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps([data.weights, rows]))


def test_two_ranks_are_like_one_with_their_batches(tmp_path: Path) -> None:
    write_texts(tmp_path)
    alone = fit(tmp_path, [DomainReweighting(every=2)], 6, Stranger(), text_data(tmp_path, batch_size=4))
    expected = list(reweighting_of(alone).history)
    data = text_data(tmp_path, batch_size=2)
    fit(
        tmp_path,
        [DomainReweighting(every=2), Report(tmp_path)],
        6,
        Stranger(),
        data,
        devices=2,
        strategy="ddp_spawn",
        logger=False,
    )
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for ours, theirs in zip(ranks[0][1], expected, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        # The mean of two ranks' mean losses is the mean over all tokens here, where all blocks are of one size.
        for name in ("loss", "reference", "weight"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert list(metrics_of(alone)) == [2, 4, 6]
    assert (tmp_path / "domains.png").exists()
    assert sorted(ranks[0][0]) == DOMAINS
