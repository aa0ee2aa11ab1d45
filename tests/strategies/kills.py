"""Ranks that are killed with -9 in the middle of a run, and the run that goes on from what they leave."""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightprune as lp
from tests.ports import free_ports
from tests.strategies.runs import CUT, STEPS, WORLD, Case, run, strategy_of

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: F401  # seconds, which fresh processes save

CASE = Case("annealed")
GRACE = 30.0  # seconds in which a survivor finds out that it is alone; then it is killed, as `srun` does at once

# Where a rank may die: at a call of a hook, counted from the start of the process, or after a while, wherever it is.
# The two validations are those of the cut, one just before it and one just after.
HOOKS = {
    "on_train_batch_start": range(CUT - 1, STEPS + 1),
    "on_before_optimizer_step": range(1, 4),
    "on_validation_start": range(1, 3),
    "on_validation_end": range(1, 3),
    "on_save_checkpoint": range(CUT - 1, STEPS),
}
SECONDS = 1.5  # about as long as a run takes from its first step to its last

# A server that has imported everything once hands out the fresh processes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Death:
    """Who dies, and when.

    Attributes:
        ranks: who does.
        hook: the callback hook in which they die; None is after `when` seconds of training.
        when: at which call of the hook.
        by: the signal: SIGKILL, or SIGSTOP for a rank that hangs.
    """

    ranks: tuple[int, ...]
    hook: str | None
    when: float
    by: signal.Signals = signal.SIGKILL

    @classmethod
    def drawn(cls, seed: str) -> "Death":
        """A death at random."""
        draw = random.Random(seed)
        ranks = draw.choice([(0,), (1,), (0, 1)])
        hook = draw.choice([*HOOKS, None])
        return cls(ranks, hook, draw.uniform(0, SECONDS) if hook is None else draw.choice(HOOKS[hook]))


class Die(Callback):
    """Sends this process its signal when its time has come."""

    def __init__(self, death: Death) -> None:
        self.death = death
        self.calls = 0
        if death.hook is not None:
            setattr(self, death.hook, self.count)

    def count(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.death.when:
            os.kill(os.getpid(), self.death.by)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.death.hook is None:
            timer = threading.Timer(self.death.when, self.strike, [trainer])
            timer.daemon = True
            timer.start()

    def strike(self, trainer: L.Trainer) -> None:
        if trainer.global_step < STEPS:  # after the last one there is nothing left to go on with
            os.kill(os.getpid(), self.death.by)


def live(strategy: str, folder: Path, rank: int, port: int, death: Death | None, timeout: float) -> None:
    """One rank of a run that goes on from what there is in `folder`, and writes down there how it ends."""
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    more: list[Callback] = [
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True),
        lp.PreemptionCheckpoint(),
    ]
    if death is not None and rank in death.ranks:
        more.append(Die(death))
    made = strategy_of(strategy, timeout=timedelta(seconds=timeout))
    end = run(CASE, made, folder, rank=rank, world=WORLD, resume="last", more=more)
    torch.save(end, folder / f"end{rank}.pt")


@contextmanager
def started(
    strategy: str, folder: Path, death: Death | None = None, *, timeout: float = 600, absent: tuple[int, ...] = ()
) -> Iterator[list[Process]]:
    """The ranks of a run; what is left of them at the end is killed.

    Args:
        timeout: seconds for which a rank waits for the others.
        absent: ranks that are never started.
    """
    (port,) = free_ports(1)
    processes = [
        PROCESSES.Process(target=live, args=(strategy, folder, rank, port, death, timeout)) for rank in range(WORLD)
    ]
    present = [process for rank, process in enumerate(processes) if rank not in absent]
    for process in present:
        process.start()
    try:
        yield processes
    finally:
        for process in present:
            process.kill()
            process.join()


def statuses(strategy: str, folder: Path, death: Death | None = None) -> list[int | None]:
    """Run all ranks; the status that each ends with."""
    dying = () if death is None else death.ranks
    with started(strategy, folder, death) as processes:
        for rank in dying:
            processes[rank].join()
        for rank in set(range(WORLD)) - set(dying):
            processes[rank].join(GRACE if dying else None)
    return [process.exitcode for process in processes]
