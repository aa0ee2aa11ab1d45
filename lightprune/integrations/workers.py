"""Data workers and the signals that a cluster sends to all processes of a job."""

import os
import signal
import threading


def outlive_preemption(worker_id: int) -> None:
    """A data loader's `worker_init_fn`: the worker ends when its trainer ends it, not by a signal to the whole job."""
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where no job has several processes
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # Python 3.10: `_exit` is documented; it ends a worker whose other threads hold locks
