"""Invariant 6 for runs that are told to stop: whenever the signal comes, the end is that of the undisturbed run."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

import lightprune as lp
from lightprune.callbacks.preemption import PreemptionCheckpoint
from lightprune.integrations.workers import outlive_preemption
from tests.families import tiny_lm
from tests.ports import free_ports
from tests.resume_run import CUT, STEPS, Shuffled, callbacks_of, checkpoint_of
from tests.test_resume import differences
from tests.training import Plain, batches, fit, trainer_for

ACCUMULATE = 2


class Signal(Callback):
    """Sends this process signals, the first time that a hook is called after so many optimizer steps."""

    def __init__(self, hook: str, step: int, *numbers: int) -> None:
        self.step = step
        self.numbers = list(numbers)
        setattr(self, hook, self.send)

    def send(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            while self.numbers:
                os.kill(os.getpid(), self.numbers.pop())


def run(folder: Path, *extra: Callback, every: int = 100) -> dict[str, Any]:
    """Train to the end or to a signal, from the last checkpoint if there is one; how far it came, and with what."""
    module = Plain(tiny_lm("qwen2", attention_dropout=0.3), optimizer=torch.optim.AdamW)
    trainer = trainer_for(
        [*extra, *callbacks_of({}), checkpoint_of(folder, {"every": every}), PreemptionCheckpoint()],
        max_steps=STEPS,
        enable_checkpointing=True,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=4 * ACCUMULATE,
        default_root_dir=folder,
    )
    loaders = {"train_dataloaders": Shuffled(8 * ACCUMULATE), "val_dataloaders": batches(1)}
    status: Any = 0
    try:
        trainer.fit(module, **loaders, ckpt_path="last", weights_only=True)
    except SystemExit as stop:
        status = stop.code
    return {
        "status": status,
        "step": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx + 1,
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict() if trainer.optimizers else None,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    end = run(tmp_path_factory.mktemp("undisturbed"))
    assert end["step"] == STEPS
    return end


@pytest.mark.parametrize(
    ("hook", "step", "numbers", "stops_at"),
    [
        ("on_train_epoch_start", 0, [signal.SIGTERM], 1),
        ("on_train_batch_start", 2, [signal.SIGUSR1], 3),  # the first of two batches that are accumulated
        ("on_after_backward", 8, [signal.SIGTERM], 9),
        ("on_validation_batch_start", 4, [signal.SIGUSR1, signal.SIGTERM], 5),  # validation comes after the step's end
        ("on_validation_start", CUT, [signal.SIGTERM, signal.SIGTERM], CUT),  # inside the cut
        ("on_train_batch_end", STEPS, [signal.SIGTERM], STEPS),
    ],
)
def test_stops_after_the_step_and_resumes_as_if_undisturbed(
    hook: str, step: int, numbers: list[int], stops_at: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    stopped = run(tmp_path, Signal(hook, step, *numbers))
    assert (stopped["status"], stopped["step"]) == (75, stops_at)
    assert stopped["batches"] == stops_at * ACCUMULATE
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == stops_at
    end = run(tmp_path)
    assert (end["status"], end["step"]) == (0, STEPS)
    assert differences(undisturbed["weights"], end["weights"]) == []
    if stops_at < STEPS:
        assert differences(undisturbed["optimizer"], end["optimizer"]) == []
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = L.Trainer.save_checkpoint
    monkeypatch.setattr(
        L.Trainer, "save_checkpoint", lambda self, *args: (saved.append(self.global_step), save(self, *args))
    )
    run(tmp_path, Signal("on_after_backward", 3, signal.SIGUSR1), every=2)
    assert saved == [2, 4]


def test_the_process_has_its_own_handlers_again(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in PreemptionCheckpoint.SIGNALS]
    run(tmp_path, Signal("on_after_backward", 1, signal.SIGTERM))
    assert [signal.getsignal(number) for number in PreemptionCheckpoint.SIGNALS] == before
    run(tmp_path)
    assert [signal.getsignal(number) for number in PreemptionCheckpoint.SIGNALS] == before


@pytest.mark.parametrize("savers", [[], [ModelCheckpoint(save_last=None)], [ModelCheckpoint(save_last="link")]])
def test_refuses_a_run_that_keeps_no_last_checkpoint(savers: list[Callback], tmp_path: Path) -> None:
    trainer = trainer_for(
        [*savers, PreemptionCheckpoint()], max_steps=1, enable_checkpointing=True, default_root_dir=tmp_path
    )
    with pytest.raises(lp.ConfigError, match="save_last: true"):
        trainer.fit(Plain(), batches(1))


class Numbers(Dataset[int]):
    """As many numbers as anyone wants."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_end_with_their_trainer_and_not_by_a_signal_to_the_whole_job() -> None:
    loader = iter(DataLoader(Numbers(), num_workers=1, worker_init_fn=outlive_preemption))
    assert next(loader) == 0
    (worker,) = loader._workers  # type: ignore[attr-defined]
    for name in ("TERM", "USR1"):  # as from Slurm: another process sends them
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [next(loader).item() for _ in range(90)] == list(range(1, 91))
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


def test_workers_without_sigwaitinfo_can_still_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(signal, "sigwaitinfo")
    loader = iter(DataLoader(Numbers(), num_workers=1, worker_init_fn=outlive_preemption))
    assert next(loader) == 0
    (worker,) = loader._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fit_outside_the_main_thread(tmp_path: Path, num_workers: int) -> None:
    """As in a notebook's or a scheduler's own thread."""
    loader = DataLoader(batches(2), batch_size=None, num_workers=num_workers, worker_init_fn=outlive_preemption)
    trainer = trainer_for(
        [ModelCheckpoint(tmp_path, save_last=True), PreemptionCheckpoint()], max_steps=2, enable_checkpointing=True
    )
    with ThreadPoolExecutor(1) as thread, pytest.warns(UserWarning, match=r"cannot see signals, because this fit runs"):
        thread.submit(trainer.fit, Plain(), loader).result(timeout=120)
    assert trainer.global_step == 2


WINDOWS = """
import os, signal, sys
from lightning.pytorch.callbacks import ModelCheckpoint

for name in ("SIGUSR1", "sigwaitinfo", "pthread_sigmask"):
    delattr(signal, name)
del os.EX_TEMPFAIL

from lightprune.callbacks.preemption import PreemptionCheckpoint
from lightprune.integrations.workers import outlive_preemption
from tests.training import Plain, Spy, batches, trainer_for

assert PreemptionCheckpoint.SIGNALS == (signal.SIGTERM,)
outlive_preemption(0)
signal.SIGUSR1 = signal.Signals.SIGUSR1  # Lightning asks the platform, not the module

def stop(trainer, module):
    if trainer.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

saver = ModelCheckpoint(sys.argv[1], save_last=True, save_top_k=0)
callbacks = [saver, PreemptionCheckpoint(), Spy(stop, "on_after_backward")]
trainer_for(callbacks, max_steps=50, enable_checkpointing=True).fit(Plain(), batches(200))
"""


def test_without_the_signals_that_windows_lacks(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", WINDOWS, str(tmp_path)], env=environment, timeout=300, check=False)
    assert done.returncode == 75
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


RANK = """
import os, signal, sys, time
from tests.test_preemption import Signal
from tests.training import Plain, batches, trainer_for
import lightprune as lp
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.02 * (1 + rank))
rank = int(os.environ["LOCAL_RANK"])
stopper = lp.PreemptionCheckpoint(poll_seconds=float(sys.argv[2]))
callbacks = [ModelCheckpoint(sys.argv[1], save_last=True, save_top_k=0), stopper, Slow()]
if rank == 1:
    callbacks.append(Signal("on_after_backward", 2, signal.SIGTERM))
trainer = trainer_for(callbacks, max_steps=50, enable_checkpointing=True, strategy="ddp", devices=2)
trainer.fit(Plain(), batches(200))
"""


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, (3, 3)), (0.4, (4, 40))])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    tmp_path: Path, seconds: float, steps: tuple[int, int]
) -> None:
    """At once where the ranks ask each other after every step, else when they ask the next time."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(seconds)], env={**environment, "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [75, 75]
    finally:
        for rank in ranks:
            rank.kill()
    stopped = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert steps[0] <= stopped <= steps[1]


def test_validation_after_the_fit_of_the_same_trainer(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(Plain(), [PreemptionCheckpoint(), saver], batches(2), 2, enable_checkpointing=True)
    trainer.validate(trainer.lightning_module, batches(1), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(trainer.lightning_module, batches(2))
    assert trainer.global_step == 4
