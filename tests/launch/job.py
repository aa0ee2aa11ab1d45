"""`Job`: a job that the tests have submitted, in a directory of its own."""

from dataclasses import dataclass
from pathlib import Path

from tests.launch.cluster import Cluster

SCRIPT = str(Path(__file__).parents[2] / "launch" / "fit.sbatch")


@dataclass(frozen=True)
class Job:
    """A job, known by its id, and its directory."""

    cluster: Cluster
    folder: Path
    id: str

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.cluster.job(self.id)["Restarts"])

    def over(self) -> bool:
        """Whether it will not run any more."""
        return self.cluster.job(self.id)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    def until_paused(self, ranks: int) -> list[int]:
        """Wait until all ranks are at their `Pause`; their process ids."""
        files = [self.folder / "paused" / str(rank) for rank in range(ranks)]
        self.cluster.until(lambda: all(file.exists() for file in files) or self.over(), f"a pause of {self.folder}")
        assert not self.over(), self.log()
        return [int(file.read_text()) for file in files]

    def until_requeued(self) -> None:
        """Wait until it is in the queue again."""
        self.cluster.until(lambda: self.restarts == 1 or self.over(), f"a requeue of {self.folder}")
        assert not self.over(), self.log()
        self.cluster.state_of(self.id, "PENDING")

    def end(self) -> str:
        """Wait until it is over; how it ended."""
        self.cluster.until(self.over, f"the end of {self.folder}")
        return self.cluster.job(self.id)["JobState"]

    def log(self) -> str:
        """All that it wrote."""
        files = [*self.folder.glob("slurm-*.out"), *self.folder.glob("logs/*/rank*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)

    def rank_log(self, rank: int) -> str:
        """What one rank wrote."""
        return (self.folder / "logs" / self.id / f"rank{rank}.log").read_text()
