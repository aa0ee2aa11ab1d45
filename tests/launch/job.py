"""`Job`: a job that the tests have submitted, in a directory of its own."""

import time
from collections.abc import Callable
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

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition; if it does not come, fail with what the job wrote, and where its processes are."""
        try:
            self.cluster.until(condition, f"{what} of job {self.id}")
        except AssertionError as error:
            self.cluster.run("scancel", "--signal=ABRT", self.id)  # of which PYTHONFAULTHANDLER makes tracebacks
            time.sleep(5)
            raise AssertionError(f"{error}\n{self.log()}") from None

    def until_paused(self, ranks: int) -> list[int]:
        """Wait until all ranks are at their `Pause`; their process ids."""
        files = [self.folder / "paused" / str(rank) for rank in range(ranks)]
        self.until(lambda: all(file.exists() for file in files) or self.over(), "a pause")
        assert not self.over(), self.log()
        return [int(file.read_text()) for file in files]

    def until_requeued(self) -> None:
        """Wait until it is in the queue again."""
        self.until(lambda: self.restarts == 1 or self.over(), "a requeue")
        assert not self.over(), self.log()
        self.cluster.state_of(self.id, "PENDING")

    def end(self) -> str:
        """Wait until it is over; how it ended."""
        self.until(self.over, "the end")
        return self.cluster.job(self.id)["JobState"]

    def log(self) -> str:
        """All that it wrote."""
        files = [*self.folder.glob("slurm-*.out"), *self.folder.glob("logs/*/rank*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)

    def rank_log(self, rank: int) -> str:
        """What one rank wrote."""
        return (self.folder / "logs" / self.id / f"rank{rank}.log").read_text()
