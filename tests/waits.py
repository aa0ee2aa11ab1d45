"""Counting what waits in a training step: reads of a tensor by the host, and messages between ranks.

A GPU works behind the host. A read of a tensor's value makes the host wait until the GPU has caught up, and every
message between ranks makes all of them wait for the slowest. On a CPU neither shows in the time, so they are counted,
by the line of lightprune that causes them. `python -m tests.waits` prints the table of docs/measurements.md,
`python -m tests.waits 2` that of two ranks.
"""

import linecache
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lightprune
from lightprune.callbacks.run_report import RunReport
from tests.families import tiny_lm
from tests.training import Plain, batches, trainer_for

STEPS = 12

# Functions of a tensor whose result, or its size, the host has to know. What else it may do with one, it does behind.
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
    "equal",
    "allclose",
}
MESSAGES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier", "reduce")


class Waits(TorchFunctionMode):
    """Counts, while it is entered, the waits that a line of lightprune causes, step by step.

    Attributes:
        steps: for each training batch, the lines that waited in it, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and any(isinstance(a, Tensor) and a.dtype == torch.bool for a in args[1:])
        if name in READS or by_mask:
            self._note(name, innermost=True)
        return func(*args, **(kwargs or {}))

    def message(self, name: str) -> None:
        """Note a message between ranks."""
        self._note(name, innermost=False)

    def _note(self, what: str, *, innermost: bool) -> None:
        """Note a wait if lightprune causes it: itself, or for messages by whatever it calls."""
        for file, line in _frames():
            if "/lightprune/" in file:
                asks_a_cpu_only = 'device.type == "cpu"' in linecache.getline(file, line)
                if self.steps and not asks_a_cpu_only:
                    self.steps[-1][f"{file.rpartition('/lightprune/')[2]}:{line} {what}"] += 1
                return
            if innermost and ("/torch/" not in file or "/torch/optim/" in file):  # optimizers count steps on the host
                return


def _frames() -> Iterator[tuple[str, int]]:
    """Files and lines of the calls that led here, the latest first."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


class Steps(Callback):
    """Begins a count with each batch. It comes first, so that a batch's count holds the hooks of all others."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def on_train_batch_start(self, *args: Any) -> None:
        self._waits.steps.append(Counter())


@contextmanager
def messages_of(waits: Waits) -> Iterator[None]:
    """Let `waits` count the messages of torch.distributed."""
    with ExitStack() as stack:
        for name in MESSAGES:
            original = getattr(dist, name)

            def counted(*args: Any, name: str = name, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                waits.message(name)
                return original(*args, **kwargs)

            stack.enter_context(patch.object(dist, name, counted))
        yield


def _saver() -> Callback:
    """Saves only when it is told to."""
    return ModelCheckpoint(tempfile.mkdtemp(), save_last=True, save_top_k=0, every_n_train_steps=1000)


def counted_fit(
    parts: Sequence[Callback],
    steps: int = STEPS,
    data: L.LightningDataModule | None = None,
    module: L.LightningModule | None = None,
    **kwargs: Any,
) -> list[Counter[str]]:
    """The waits of each step of a fit with these callbacks, on a tiny Llama, without logging."""
    waits = Waits()
    saves = any(isinstance(part, ModelCheckpoint) for part in parts)
    trainer = trainer_for([Steps(waits), *parts], steps, enable_checkpointing=saves, **kwargs)
    module = Plain(tiny_lm(layers=4)) if module is None else module
    with waits, messages_of(waits), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if data is None:
            trainer.fit(module, batches(steps))
        else:
            trainer.fit(module, datamodule=data)
    return waits.steps


def cases() -> dict[str, Callable[[], list[Callback]]]:
    """Every part, in a run in which it acts in steps 2 to 8 at least."""
    p = lightprune

    def cut(*parts: Callback, at: int = 10) -> list[Callback]:
        return [*parts, p.StructuredCut(at=at, validate=False)]

    def layers() -> Callback:
        return p.RandomSelector(drop=1)

    def channels() -> Callback:
        return p.RandomUnitSelector(channels=0.5, multiple_of=1)

    whole: dict[str, Any] = {"start": 0, "stop": 10}
    return {
        "LayerGateSelector": lambda: cut(p.LayerGateSelector(drop=1, rounds=1, steps_per_round=10)),
        "BlockInfluenceSelector": lambda: cut(p.BlockInfluenceSelector(drop=1, **whole)),
        "GreedyPerplexitySelector": lambda: cut(p.GreedyPerplexitySelector(drop=1, **whole)),
        "ActivationUnitSelector": lambda: cut(p.ActivationUnitSelector(channels=0.5, multiple_of=1, **whole)),
        "TaylorUnitSelector": lambda: cut(p.TaylorUnitSelector(channels=0.5, multiple_of=1, **whole)),
        "HardConcreteSelector": lambda: cut(p.HardConcreteSelector(channels=0.5, multiple_of=1, start=0, stop=10)),
        "HardConcreteSelector, layers and hidden": lambda: cut(
            p.HardConcreteSelector(layers=3, hidden=0.5, multiple_of=1, start=0, stop=10)
        ),
        "DifferencePenalty": lambda: cut(layers(), p.DifferencePenalty()),
        "GateAnnealing": lambda: cut(layers(), p.GateAnnealing()),
        "GateAnnealing of units": lambda: cut(channels(), p.GateAnnealing()),
        "GroupNormPenalty": lambda: cut(channels(), p.GroupNormPenalty()),
        "ProximalGroupLasso": lambda: cut(channels(), p.ProximalGroupLasso()),
        "Recovery": lambda: [*cut(layers(), at=1), p.Recovery(lr=1e-3)],
        "Distillation": lambda: [*cut(layers(), at=1), p.Distillation(hidden=0.1, top_k=4)],
        "RunReport": lambda: [RunReport()],
        "PreemptionCheckpoint": lambda: [p.PreemptionCheckpoint(), _saver()],
        "LoRARecovery": lambda: [*cut(layers(), at=1), p.LoRARecovery(r=2)],
    }


QUIET = slice(3, 8)
"""The steps that are looked at: inside every window, at no border of one."""


def most(steps: Sequence[Counter[str]]) -> Counter[str]:
    """Of the quiet steps, the lines that wait in the one with the most waits."""
    return max(steps[QUIET], key=lambda lines: lines.total())


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    devices: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    for name, case in cases().items():
        lines = most(counted_fit(case(), **devices))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"| {name} | {lines.total()} | {', '.join(sorted(lines))} |", flush=True)
