"""`launch/fit.sbatch` itself, submitted to a real Slurm: it ends, is preempted, runs out of time, fails, as it says."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.launch.cluster import Cluster, missing_programs, slurm_cluster
from tests.test_cli import LAYERS, inputs  # noqa: F401  # a fixture
from tests.test_resume import differences

ROOT = Path(__file__).parents[2]
SELECT, CUT, STEPS = 2, 4, 6

# One worker, and so one cluster, for all tests of this file: `pytest --dist loadgroup`.
pytestmark = pytest.mark.xdist_group("slurm")

PRUNING: list[Any] = [
    {"class_path": "lightprune.BlockInfluenceSelector", "init_args": {"drop": 2, "stop": SELECT}},
    {"class_path": "lightprune.GateAnnealing"},
    {"class_path": "lightprune.StructuredCut", "init_args": {"at": CUT}},
    {"class_path": "lightprune.ExportHF", "init_args": {"path": "pruned"}},
]


@dataclass(frozen=True)
class Layout:
    """Where a run runs, and whether it prunes there."""

    ranks: int
    sbatch: list[str] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=lambda: PRUNING)


LAYOUTS = {
    "one node": Layout(ranks=1),
    "two nodes": Layout(ranks=2, sbatch=["--nodes=2"], trainer={"strategy": "ddp"}, callbacks=[]),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes. Without Slurm the tests are skipped, and fail where LIGHTPRUNE_REQUIRE_SLURM is set."""
    missing = missing_programs()
    if missing:
        reason = f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)"
        assert not os.environ.get("LIGHTPRUNE_REQUIRE_SLURM"), reason
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster


@dataclass
class Job:
    """A submitted run, in a directory of its own."""

    cluster: Cluster
    folder: Path
    layout: Layout
    id: str

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    def until_paused(self) -> list[int]:
        """Wait until all ranks are at their `Pause`; their process ids."""
        files = [self.folder / "paused" / str(rank) for rank in range(self.layout.ranks)]
        self.cluster.until(lambda: all(file.exists() for file in files) or self.ended(), f"a pause of {self.folder}")
        assert not self.ended(), self.log()
        return [int(file.read_text()) for file in files]

    def ended(self) -> bool:
        return self.cluster.job(self.id)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    def until_requeued(self) -> None:
        """Wait until it is in the queue again, and let it start without the two minutes that Slurm makes it wait."""
        self.cluster.until(lambda: self.restarts == 1 or self.ended(), f"a requeue of {self.folder}\n{self.log()}")
        assert not self.ended(), self.log()
        self.cluster.state_of(self.id, "PENDING")
        self.cluster.update(self.id, StartTime="now", TimeLimit="30")

    def end(self) -> str:
        """Wait until it is over; how it ended."""
        return self.cluster.state_of(self.id, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

    def log(self) -> str:
        """All that it wrote."""
        files = [*self.folder.glob("slurm-*.out"), *self.folder.glob("logs/*/rank*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)

    def rank_log(self, rank: int) -> str:
        """What one rank wrote."""
        return (self.folder / "logs" / self.id / f"rank{rank}.log").read_text()

    def result(self) -> dict[str, Any]:
        """What training came to."""
        saved = torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)
        return {key: saved[key] for key in ("global_step", "state_dict", "optimizer_states", "TextDataModule")}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Job]:  # noqa: F811
    """All runs, submitted at once: Slurm starts each as soon as there is room."""
    moments = {
        "undisturbed": [],
        "preempted": [pause("on_train_batch_start", SELECT + 1)],
        "preempted in the cut": [pause("on_validation_start", CUT)],
        "out of time": [pause("on_train_batch_start", CUT + 1)],
        "rank killed": [pause("on_train_batch_start", 1)],
    }
    submitted = {}
    for moment, layout in (
        ("undisturbed", "one node"),
        ("preempted in the cut", "one node"),
        ("out of time", "one node"),
        ("undisturbed", "two nodes"),
        ("preempted", "two nodes"),
        ("rank killed", "two nodes"),
    ):
        folder = tmp_path_factory.mktemp(f"{moment} on {layout}".replace(" ", "-"))
        submitted[moment, layout] = submit(cluster, folder, inputs, LAYOUTS[layout], moments[moment])
    return submitted


def pause(hook: str, step: int) -> dict[str, Any]:
    return {"class_path": "tests.launch.pause.Pause", "init_args": {"hook": hook, "step": step}}


def submit(cluster: Cluster, folder: Path, inputs: Path, layout: Layout, extra: list[Any], *options: str) -> Job:  # noqa: F811
    """Submit the shipped script with a config like a user's."""
    saver = {"dirpath": "checkpoints", "every_n_train_steps": 1, "save_last": True, "save_top_k": 0}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [*extra, *layout.callbacks, {"class_path": "ModelCheckpoint", "init_args": saver}],
            **layout.trainer,
        },
        "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": str(inputs / "model")}},
        "data": {
            "class_path": "lightprune.data.TextDataModule",
            "init_args": {
                "domains": {"plays": {"files": str(inputs / "text.txt")}},
                "block_size": 16,
                "batch_size": 2,
                "num_workers": 1,
                "cache_dir": "cache",
            },
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    python = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} HF_HUB_OFFLINE=1\n"
    (folder / "env.sh").write_text(python)
    command = [
        *layout.sbatch,
        "--cpus-per-task=1",
        str(ROOT / "launch" / "fit.sbatch"),
        "--config=config.yaml",
        *options,
    ]
    return Job(cluster, folder, layout, cluster.submit(*command, cwd=folder, LIGHTPRUNE_ENV="env.sh"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_finishes(layout: str, jobs: dict[tuple[str, str], Job]) -> None:
    job = jobs["undisturbed", layout]
    assert job.end() == "COMPLETED", job.log()
    assert job.restarts == 0
    assert job.result()["global_step"] == STEPS
    tokenized = ["Tokenizing" in job.rank_log(rank) for rank in range(job.layout.ranks)]
    assert tokenized == [rank == 0 for rank in range(job.layout.ranks)]
    if job.layout.callbacks:
        summary = json.loads((job.folder / "summary.json").read_text())
        assert summary["after"]["layers"] == LAYERS - 2
        assert (job.folder / "pruned" / "model.safetensors").exists()


@pytest.mark.parametrize(("moment", "layout"), [("preempted in the cut", "one node"), ("preempted", "two nodes")])
def test_preempted(moment: str, layout: str, jobs: dict[tuple[str, str], Job]) -> None:
    job = jobs[moment, layout]
    job.until_paused()
    job.cluster.run("scontrol", "requeue", job.id)
    job.until_requeued()
    check_resumed(job, jobs["undisturbed", layout], "SIGTERM")


def test_out_of_time(jobs: dict[tuple[str, str], Job]) -> None:
    job = jobs["out of time", "one node"]
    job.until_paused()
    hours, minutes, _ = map(int, job.cluster.job(job.id)["RunTime"].split(":"))
    job.cluster.update(job.id, TimeLimit=str(60 * hours + minutes + 2))
    job.until_requeued()
    check_resumed(job, jobs["undisturbed", "one node"], "SIGUSR1")


def check_resumed(job: Job, undisturbed: Job, stopped_by: str) -> None:
    """It saved, went on from there, and ends bit for bit as if nothing had happened."""
    assert job.end() == "COMPLETED", job.log()
    assert undisturbed.end() == "COMPLETED", undisturbed.log()
    assert job.restarts == 1
    assert f"Stopped by {stopped_by} after step" in job.rank_log(0)
    assert "Restoring states from the checkpoint path" in job.rank_log(0)
    assert differences(undisturbed.result(), job.result()) == []
    exports = [run.folder / "pruned" / "model.safetensors" for run in (undisturbed, job)]
    if job.layout.callbacks:
        assert exports[0].read_bytes() == exports[1].read_bytes()


def test_a_rank_that_dies_ends_the_job(jobs: dict[tuple[str, str], Job]) -> None:
    job = jobs["rank killed", "two nodes"]
    pids = job.until_paused()
    os.kill(pids[1], signal.SIGKILL)
    assert job.end() == "FAILED", job.log()
    assert job.restarts == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mistake_fails_the_job_with_its_sentence(
    layout: str,
    cluster: Cluster,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    job = submit(cluster, tmp_path, inputs, LAYOUTS[layout], [], "--data.init_args.batch_size=100000")
    assert job.end() == "FAILED", job.log()
    assert (job.restarts, job.cluster.job(job.id)["ExitCode"]) == (0, "2:0")
    last = (tmp_path / f"slurm-{job.id}.out").read_text().strip().splitlines()[-1]
    assert "too few for one batch of 100000" in last
