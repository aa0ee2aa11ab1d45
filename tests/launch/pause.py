"""`Pause`: a run that waits at one moment, for a test to do something to its job just then."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightprune.callbacks.preemption import PreemptionCheckpoint
from lightprune.integrations.lightning import callbacks_of


class Pause(Callback):
    """In a job's first start, waits at a hook until this process has got a signal.

    Writes its process id to `paused/<rank>` in the working directory when it begins to wait.

    Args:
        hook: the callback hook.
        step: the optimizer step at which it waits, the first time that the hook is called.
    """

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        self.waited = "SLURM_RESTART_COUNT" in os.environ
        setattr(self, hook, self.wait)

    def wait(self, trainer: L.Trainer, *args: Any) -> None:
        """Wait, if this is the moment."""
        if self.waited or trainer.global_step != self.step:
            return
        self.waited = True
        (stopper,) = (callback for callback in callbacks_of(trainer) if isinstance(callback, PreemptionCheckpoint))
        stopper.poll_seconds = 0  # the run is shorter than the pause between two polls
        Path("paused").mkdir(exist_ok=True)
        draft = Path("paused", f".{trainer.global_rank}")
        draft.write_text(str(os.getpid()))
        draft.rename(draft.with_name(str(trainer.global_rank)))
        deadline = time.monotonic() + 900
        while stopper.received is None:
            assert time.monotonic() < deadline, "no signal came"
            time.sleep(0.05)
