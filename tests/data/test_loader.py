"""The very same batches come for any number of workers, and however often the run is killed and resumed."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightprune.data import BlockDataset, MixtureLoader, MixtureSampler
from lightprune.data.blocks import Blocks

COUNTS = {"a": 50, "b": 7, "c": 20}
SIZE = 6
STEPS = 60

# A server that has imported everything once hands out the fresh processes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> BlockDataset:
    """Every token is another one."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.arange(SIZE * sum(COUNTS.values()), dtype=np.uint16))
    starts = [0, *itertools.accumulate(COUNTS.values())]
    return BlockDataset(
        [Blocks(path, SIZE * start, count, SIZE) for start, count in zip(starts, COUNTS.values(), strict=False)]
    )


class Run:
    """A training run that changes its weights every third step; its ranks take turns in this process."""

    def __init__(self, dataset: BlockDataset, *, workers: int = 0, ranks: int = 1, batch_size: int = 4) -> None:
        self.step = 0
        self.samplers = [
            MixtureSampler(
                COUNTS,
                weights={"a": 1, "b": 1, "c": 1},
                batch_size=batch_size // ranks,
                num_replicas=ranks,
                rank=rank,
                weights_lag=4,
            )
            for rank in range(ranks)
        ]
        self.loaders = [MixtureLoader(dataset, sampler, num_workers=workers) for sampler in self.samplers]

    def state(self) -> str:
        """A checkpoint, by the first rank, as text."""
        return json.dumps({"step": self.step, "data": self.loaders[0].state_dict()})

    def load(self, checkpoint: str) -> "Run":
        state = json.loads(checkpoint)
        self.step = state["step"]
        for loader in self.loaders:
            loader.load_state_dict(state["data"])
        return self

    def until(self, last: int) -> Iterator[str]:
        """Trains up to a step; yields a hash of every batch, that of all ranks together."""
        iterators = [iter(loader) for loader in self.loaders]
        while self.step < last:
            shares = [next(iterator) for iterator in iterators]
            self.step += 1
            if self.step % 3 == 0:
                for sampler in self.samplers:
                    sampler.set_weights({"a": 1, "b": self.step % 5, "c": self.step % 4})
            yield fingerprint(shares)


def fingerprint(shares: list[dict[str, Tensor]]) -> str:
    """Of the samples in the order of the global sequence, which deals them to the ranks in turn."""
    keys = sorted(shares[0])
    whole = {key: torch.stack([share[key] for share in shares], dim=1).flatten(0, 1) for key in keys}
    return hashlib.sha256(b"".join(whole[key].numpy().tobytes() for key in keys)).hexdigest()


@pytest.fixture(scope="module")
def never_stopped(dataset: BlockDataset) -> list[str]:
    found = list(Run(dataset).until(STEPS))
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_number_of_workers_changes_no_batch(dataset: BlockDataset, never_stopped: list[str], workers: int) -> None:
    assert list(Run(dataset, workers=workers).until(STEPS)) == never_stopped


def train(folder: Path, dataset: BlockDataset, workers: int, ranks: int, kill: int | None) -> None:
    """Goes on from the last checkpoint in `folder`; kill -9 of it and its workers in the step `kill`, unsaved."""
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # of the workers; in here it is that of `PROCESSES`
    os.setsid()
    checkpoint, draft = folder / "checkpoint", folder / "draft"
    run = Run(dataset, workers=workers, ranks=ranks)
    if checkpoint.exists():
        run.load(checkpoint.read_text())
    with (folder / "seen").open("a") as seen:
        for batch in run.until(STEPS):
            print(run.step, batch, file=seen, flush=True)
            if run.step == kill:
                os.killpg(os.getpid(), signal.SIGKILL)
            draft.write_text(run.state())
            draft.replace(checkpoint)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_and_resumed_20_times_sees_the_very_same_batches(
    dataset: BlockDataset, never_stopped: list[str], workers: int, ranks: int, tmp_path: Path
) -> None:
    kills = sorted(random.Random(workers + ranks).sample(range(1, STEPS), 20))
    for kill in (*kills, None):
        process = PROCESSES.Process(target=train, args=(tmp_path, dataset, workers, ranks, kill))
        process.start()
        process.join()
        assert process.exitcode == (0 if kill is None else -signal.SIGKILL)
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    # The step that was under way comes again.
    assert [int(step) for step, _ in seen] == sorted([*range(1, STEPS + 1), *kills])
    assert [batch for _, batch in seen] == [never_stopped[int(step) - 1] for step, _ in seen]


def test_workers_and_ranks_may_change_at_a_resume(dataset: BlockDataset, never_stopped: list[str]) -> None:
    found: list[str] = []
    checkpoint = Run(dataset).state()
    options: list[dict[str, Any]] = [{"workers": 1}, {"ranks": 2}, {"ranks": 4, "workers": 1}, {"workers": 3}, {}]
    for part, option in enumerate(options, 1):
        run = Run(dataset, **option).load(checkpoint)
        found += run.until(part * STEPS // len(options))
        checkpoint = run.state()
    assert found == never_stopped


def test_weights_act_after_the_stated_number_of_batches(dataset: BlockDataset) -> None:
    for workers in (0, 2):
        run = Run(dataset, workers=workers)
        iterator, domains = iter(run.loaders[0]), []
        for step in range(20):
            domains.append(set(next(iterator)["domain"].tolist()))
            if step == 5:
                run.samplers[0].set_weights({"a": 0, "b": 1, "c": 0})
        assert domains[9] != {1}, "batch 10, the 4th after the change, is still of the old weights"
        assert domains[10:] == [{1}] * 10
