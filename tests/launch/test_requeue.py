"""What `launch/fit.sbatch` makes of the ways in which a run may answer the warning, with small programs for the run."""

import sys
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.job import SCRIPT, Job

PROGRAMS = {
    "hears nothing": "trap '' USR1",
    "crashes": "trap 'exit 1' USR1",
    "finds a mistake": "trap 'exit 2' USR1",
    "finishes": "trap 'exit 0' USR1",
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """One job for each program, all at once; the warning comes at once, for their limit is nearer than that."""
    return {name: submit(cluster, tmp_path_factory.mktemp("job"), program) for name, program in PROGRAMS.items()}


def submit(cluster: Cluster, folder: Path, program: str) -> Job:
    """Submit the script with a `python` that does only this."""
    python = folder / "python"
    python.write_text(f"#!/bin/bash\n{program}\nwhile :; do sleep 0.2; done\n")
    python.chmod(0o755)
    (folder / "env.sh").write_text(f"export PATH={folder}:$PATH\n")
    options = ["--cpus-per-task=1", "--time=1"]
    return Job(cluster, folder, cluster.submit(*options, SCRIPT, cwd=folder, LIGHTPRUNE_ENV="env.sh"))


@pytest.mark.parametrize("program", ["crashes", "hears nothing"])
def test_requeued(program: str, jobs: dict[str, Job]) -> None:
    job = jobs[program]
    job.until_requeued()
    job.cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED"


@pytest.mark.parametrize(("program", "state"), [("finds a mistake", "FAILED"), ("finishes", "COMPLETED")])
def test_over(program: str, state: str, jobs: dict[str, Job]) -> None:
    job = jobs[program]
    assert job.end() == state
    assert job.restarts == 0


def test_jobs_of_one_shell_have_ports_of_their_own(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the shell's environment holds; where the environment's file names a port, that counts."""
    monkeypatch.setitem(cluster.environment, "MASTER_PORT", "12345")
    ask = "from lightning.fabric.plugins.environments import SLURMEnvironment; print(SLURMEnvironment().main_port)"
    found, ids = [], []
    for name, line in (("one", ""), ("two", ""), ("chosen", "export MASTER_PORT=12321\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "python").write_text(f"#!/bin/bash\n{sys.executable} -c '{ask}' > port\n")
        (folder / "python").chmod(0o755)
        (folder / "env.sh").write_text(f"export PATH={folder}:$PATH\n{line}")
        job = Job(cluster, folder, cluster.submit("--cpus-per-task=1", SCRIPT, cwd=folder, LIGHTPRUNE_ENV="env.sh"))
        assert job.end() == "COMPLETED", job.log()
        found.append(int((folder / "port").read_text()))
        ids.append(int(job.id))
    assert found == [15_000 + ids[0] % 10_000, 15_000 + ids[1] % 10_000, 12_321]
    assert found[0] != found[1]


def test_an_environment_that_is_not_there(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, cluster.submit("--cpus-per-task=1", SCRIPT, cwd=tmp_path, LIGHTPRUNE_ENV="nowhere.sh"))
    assert job.end() == "FAILED"
    assert "nowhere.sh" in job.log()
