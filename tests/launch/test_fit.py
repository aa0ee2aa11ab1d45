"""`launch/fit.sbatch` itself, submitted to a real Slurm: it ends, is preempted, runs out of time, fails, as it says."""

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightprune.strategies.zero_checkpoint import whole_checkpoint
from tests.launch.cluster import Cluster
from tests.launch.job import SCRIPT, Job
from tests.test_cli import LAYERS, inputs  # noqa: F401  # a fixture
from tests.test_resume import differences

ROOT = Path(__file__).parents[2]
SELECT, CUT, STEPS = 2, 4, 6

PRUNING: list[Any] = [
    {"class_path": "lightprune.BlockInfluenceSelector", "init_args": {"drop": 2, "stop": SELECT}},
    {"class_path": "lightprune.GateAnnealing"},
    {"class_path": "lightprune.StructuredCut", "init_args": {"at": CUT}},
    {"class_path": "lightprune.ExportHF", "init_args": {"path": "pruned"}},
]


@dataclass(frozen=True)
class Layout:
    """Where a run runs."""

    ranks: int
    sbatch: list[str] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)


ZERO_3 = {
    "class_path": "lightprune.strategies.CPUDeepSpeedStrategy",
    # Below the default threshold, parameters would stay whole.
    "init_args": {"config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
LAYOUTS = {
    "one node": Layout(ranks=1),
    "two nodes": Layout(ranks=2, sbatch=["--nodes=2"], trainer={"strategy": "ddp"}),
    "two nodes, ZeRO-3": Layout(ranks=2, sbatch=["--nodes=2"], trainer={"strategy": ZERO_3}),
    "two spare nodes": Layout(ranks=2, sbatch=["--nodes=2", "--partition=spare"], trainer={"strategy": "ddp"}),
}


def pause(hook: str, step: int) -> dict[str, Any]:
    return {"class_path": "tests.launch.pause.Pause", "init_args": {"hook": hook, "step": step}}


Jobs = dict[tuple[str, str], Job]

# What is to happen to a run, on which layout, and where it waits for that.
RUNS: dict[tuple[str, str], list[Any]] = {
    ("undisturbed", "one node"): [],
    ("preempted in the cut", "one node"): [pause("on_validation_start", CUT)],
    ("out of time", "one node"): [pause("on_train_batch_start", CUT + 1)],
    ("undisturbed", "two nodes"): [],
    ("preempted in the cut", "two nodes"): [pause("on_validation_start", CUT)],
    ("undisturbed", "two nodes, ZeRO-3"): [],
    ("preempted in the cut", "two nodes, ZeRO-3"): [pause("on_validation_start", CUT)],
    ("node lost", "two spare nodes"): [pause("on_train_batch_start", CUT + 1)],
    ("rank killed", "two nodes"): [pause("on_train_batch_start", 1)],
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:  # noqa: F811
    """All runs, submitted at once: Slurm starts each as soon as there is room."""
    return {
        (fate, layout): submit(cluster, tmp_path_factory.mktemp("run"), inputs, LAYOUTS[layout], pauses)
        for (fate, layout), pauses in RUNS.items()
    }


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
            "callbacks": [*extra, *PRUNING, {"class_path": "ModelCheckpoint", "init_args": saver}],
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
    path = f"PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"
    (folder / "env.sh").write_text(f"export {path} HF_HUB_OFFLINE=1 PYTHONFAULTHANDLER=1\n")
    command = [
        *layout.sbatch,
        "--cpus-per-task=1",
        SCRIPT,
        "--config=config.yaml",
        *options,
    ]
    return Job(cluster, folder, cluster.submit(*command, cwd=folder, LIGHTPRUNE_ENV="env.sh"))


def result(job: Job) -> dict[str, Any]:
    """What training came to."""
    path = job.folder / "checkpoints" / "last.ckpt"
    if path.is_dir():  # of DeepSpeed
        saved = whole_checkpoint(path)
        return {key: saved[key] for key in ("global_step", "state_dict", "TextDataModule")}
    saved = torch.load(path, weights_only=True)
    return {key: saved[key] for key in ("global_step", "state_dict", "optimizer_states", "TextDataModule")}


@pytest.mark.parametrize("layout", [layout for fate, layout in RUNS if fate == "undisturbed"])
def test_a_run_finishes(layout: str, jobs: Jobs) -> None:
    job, ranks = jobs["undisturbed", layout], range(LAYOUTS[layout].ranks)
    assert job.end() == "COMPLETED", job.log()
    assert job.restarts == 0
    assert result(job)["global_step"] == STEPS
    assert ["Tokenizing" in job.rank_log(rank) for rank in ranks] == [rank == 0 for rank in ranks]
    summary = json.loads((job.folder / "summary.json").read_text())
    assert summary["after"]["layers"] == LAYERS - 2
    assert (job.folder / "pruned" / "model.safetensors").exists()


@pytest.mark.parametrize(("fate", "layout"), [run for run in RUNS if run[0].startswith("preempted")])
def test_preempted(fate: str, layout: str, jobs: Jobs) -> None:
    job = jobs[fate, layout]
    job.until_paused(LAYOUTS[layout].ranks)
    job.cluster.run("scontrol", "requeue", job.id)
    check_resumed(job, jobs["undisturbed", layout], "SIGTERM")


def test_out_of_time(jobs: Jobs) -> None:
    job = jobs["out of time", "one node"]
    job.until_paused(ranks=1)
    hours, minutes, _ = map(int, job.cluster.job(job.id)["RunTime"].split(":"))
    job.cluster.update(job.id, TimeLimit=str(60 * hours + minutes + 2))
    check_resumed(job, jobs["undisturbed", "one node"], "SIGUSR1")


def test_a_node_that_dies(jobs: Jobs) -> None:
    job = jobs["node lost", "two spare nodes"]
    job.until_paused(ranks=2)
    job.cluster.run("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=lost")
    # Since its daemon lives, it says that it is there again, and Slurm takes it back.
    check_resumed(job, jobs["undisturbed", "two nodes"])


def check_resumed(job: Job, undisturbed: Job, stopped_by: str | None = None) -> None:
    """It saved, where it was told to stop, went on, and ends bit for bit as if nothing had happened."""
    job.until_requeued()
    # Slurm makes a requeued job wait for two minutes; a second would do, in which its nodes forget the job before.
    job.cluster.update(job.id, StartTime="now+5", TimeLimit="60")
    assert job.end() == "COMPLETED", job.log()
    assert undisturbed.end() == "COMPLETED", undisturbed.log()
    assert job.restarts == 1
    assert stopped_by is None or f"Stopped by {stopped_by} after step" in job.rank_log(0)
    assert "Restoring states from the checkpoint path" in job.rank_log(0)
    assert differences(result(undisturbed), result(job)) == []
    exports = [run.folder / "pruned" / "model.safetensors" for run in (undisturbed, job)]
    assert exports[0].exists() == exports[1].exists()
    if exports[0].exists():
        assert exports[0].read_bytes() == exports[1].read_bytes()


def test_a_rank_that_dies_ends_the_job(jobs: Jobs) -> None:
    job = jobs["rank killed", "two nodes"]
    pids = job.until_paused(ranks=2)
    os.kill(pids[1], signal.SIGKILL)
    assert job.end() == "FAILED", job.log()
    assert job.restarts == 0


def test_a_mistake_fails_the_job_with_its_sentence(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    job = submit(cluster, tmp_path, inputs, LAYOUTS["two nodes"], [], "--data.init_args.batch_size=100000")
    assert job.end() == "FAILED", job.log()
    assert job.restarts == 0
    # 143 where the rank that saw it first has ended the other one.
    assert job.cluster.job(job.id)["ExitCode"] in ("2:0", "143:0")
    assert "too few for one batch of 100000" in (tmp_path / f"slurm-{job.id}.out").read_text()
