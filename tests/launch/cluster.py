"""A real Slurm of four nodes on this machine, of this user's own: in a directory, by hand, with ports of its own."""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.ports import free_ports

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATIENCE = 300.0  # seconds, for whatever a loaded machine has to do
SYSTEM = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=6
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=6
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=6
NodeName=n4 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[4]} CPUs=6
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
# Whose nodes may be lost.
PartitionName=spare Nodes=n3,n4 State=UP MaxTime=INFINITE
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# The nodes say that they have more cores than the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
# From SIGTERM to SIGKILL.
KillWait=120
ReturnToService=2
"""


class Cluster:
    """What the tests ask of Slurm. Jobs are known by their ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = inherited | SYSTEM | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The output of a command that must succeed."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: str, cwd: Path, **environment: str) -> str:
        """`sbatch` from the directory `cwd`; the job's id."""
        exports = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        return self.run("sbatch", "--parsable", f"--export={exports}", *command, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def update(self, job: str, **settings: str) -> None:
        """Change a job."""
        self.run("scontrol", "update", f"JobId={job}", *(f"{name}={value}" for name, value in settings.items()))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}\n{self.logs()}"
            time.sleep(0.1)

    def state_of(self, job: str, *states: str) -> str:
        """The state that a job comes to, once it is one of these."""
        self.until(lambda: self.job(job)["JobState"] in states, f"job {job} to be {' or '.join(states)}")
        return self.job(job)["JobState"]

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM["PATH"]) is None]


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start the daemons, and stop them afterwards, each by its own process."""
    # A short path, since that of munge's socket may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as daemons:
        folder = Path(name)
        cluster = Cluster(folder)
        folder.chmod(0o755)
        for part in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (folder / part).mkdir(mode=0o755)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        config = CONFIG.format(
            host=socket.gethostname(), ports=free_ports(1 + len(NODES)), user=getpass.getuser(), folder=folder
        )
        (folder / "slurm.conf").write_text(config)
        munge = {option: folder / "munge" / option for option in ("socket", "pid-file", "seed-file")}
        options = [f"--{option}={path}" for option, path in munge.items()]
        daemons.enter_context(daemon(cluster, "munged", "--foreground", "--force", f"--key-file={key}", *options))
        cluster.until(munge["socket"].exists, "munged")
        daemons.enter_context(daemon(cluster, "slurmctld", "-D", "-c"))
        for node in NODES:
            daemons.enter_context(daemon(cluster, "slurmd", "-D", "-N", node))
        cluster.until(lambda: ready(cluster), "idle nodes")
        try:
            yield cluster
        finally:
            # What a failed test has left behind would outlive the daemons.
            cluster.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
            cluster.run("scancel", f"--user={getpass.getuser()}")
            cluster.until(lambda: not cluster.run("squeue", "--noheader"), "the end of all jobs")


def ready(cluster: Cluster) -> bool:
    """Whether all nodes are idle."""
    asked = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return asked.stdout.split() == ["idle"] * len(NODES)


@contextmanager
def daemon(cluster: Cluster, program: str, *arguments: str) -> Iterator[None]:
    """A daemon in the foreground, with a log file, stopped at the end."""
    log = cluster.folder / f"{program}{arguments[-1] if program == 'slurmd' else ''}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, *arguments], env=cluster.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
