"""`trainer.precision: auto`: the precision that is fast on the devices of a run, chosen before there is a trainer."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities import rank_zero_only, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn

from lightprune.callbacks.run_report import recorded_precision
from lightprune.cli.native import Support, native_support
from lightprune.integrations.checkpoints import found_checkpoint
from lightprune.strategies.zero_checkpoint import is_sharded, model_states

_NATIVE, _ELSEWHERE = "bf16-mixed", "32-true"
_IN_BFLOAT16, _IN_FLOAT16 = ("bf16", "bf16-mixed", "bf16-true"), ("16", "16-mixed", "16-true")
# SmolLM2-135M, steps of 4 blocks of 256 tokens.
_COST = "on a CPU with AVX-512 but no BF16, bf16-mixed took 3.7 times the CPU time of 32-true"


@dataclass(frozen=True)
class Choice:
    """A precision, and why the run has it."""

    used: str
    reason: str


def choose_precision(
    trainer: Mapping[str, object], callbacks: Sequence[Callback], ckpt_path: str | None
) -> Choice | None:
    """The precision of a run, from the arguments of its trainer; on rank zero, one line says what `auto` became.

    A resumed run keeps the precision of the run that wrote the checkpoint. A new run gets bf16-mixed if all of its
    devices multiply bfloat16 natively, else 32-true. A stated precision is obeyed, with a warning if it is emulated.

    Args:
        trainer: `precision`, `accelerator`, `devices`, `strategy`, `plugins`, `logger` and `default_root_dir`.
        callbacks: all callbacks: some know where the last checkpoint is.
        ckpt_path: a path, "last", "hpc", or None.

    Returns:
        The choice. None if nothing is stated, or if a plugin decides: then it is not ours to make.
    """
    stated = trainer["precision"]
    if stated is None:
        return None
    if stated != "auto":
        _warn_if_emulated(trainer, str(stated))
        return Choice(str(stated), "stated in trainer.precision")
    if _brings_plugin(trainer):
        return None
    support = _support(trainer, torch.bfloat16)
    choice = Choice(_NATIVE if support.native else _ELSEWHERE, support.reason)
    checkpoint = _find_checkpoint(trainer, callbacks, ckpt_path)
    saved = None if checkpoint is None else _read(checkpoint)
    if saved is not None:
        choice = Choice(saved, f"the run that wrote {checkpoint} had it{_other_choice(saved, choice)}")
    _say(f"Precision {choice.used}: {choice.reason}.")
    return choice


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _other_choice(saved: str, here: Choice) -> str:
    """What to add to the message if a new run on this machine would get another precision."""
    if saved == here.used:
        return ""
    cost = f"; {_COST}" if saved in _IN_BFLOAT16 else ""
    return f" (a new run would get {here.used} here: {here.reason}{cost})"


def _warn_if_emulated(trainer: Mapping[str, object], stated: str) -> None:
    if stated not in (*_IN_BFLOAT16, *_IN_FLOAT16):
        return
    # On a CPU, Lightning makes bf16-mixed of 16-mixed.
    turned = stated in ("16", "16-mixed") and all(device.type == "cpu" for device in _devices(trainer))
    support = _support(trainer, torch.bfloat16 if stated in _IN_BFLOAT16 or turned else torch.float16)
    if support.native is False:
        rank_zero_warn(
            f"trainer.precision is {stated}, which will be emulated and slow: {support.reason}. For comparison, "
            f"{_COST}. "
            "Set trainer.precision to auto, or to 32-true."
        )


def _brings_plugin(trainer: Mapping[str, object]) -> bool:
    """Whether the config brings a precision plugin, which Lightning uses in place of the setting."""
    plugins = trainer["plugins"] or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    strategy = trainer["strategy"]
    in_strategy = isinstance(strategy, Strategy) and type(strategy.precision_plugin) is not Precision
    return in_strategy or any(isinstance(plugin, Precision) for plugin in plugins)


def _support(trainer: Mapping[str, object], dtype: torch.dtype) -> Support:
    devices, strategy = _devices(trainer), trainer["strategy"]
    forks = isinstance(strategy, str) and ("fork" in strategy or "notebook" in strategy)
    if forks and any(device.type == "cuda" for device in devices):
        return Support(None, f"trainer.strategy is {strategy}, and CUDA cannot be asked before it forks")
    return native_support(devices, dtype)


def _devices(trainer: Mapping[str, Any]) -> list[torch.device]:
    """The devices that the trainer will use on this node; none if it will refuse the setting, in its own words."""
    given = getattr(trainer["strategy"], "parallel_devices", None)
    if given:
        return list(given)
    accelerator = _accelerator(trainer["accelerator"])
    if accelerator is None or not accelerator.is_available():
        return []
    devices = accelerator.auto_device_count() if trainer["devices"] == "auto" else trainer["devices"]
    try:
        found = accelerator.get_parallel_devices(accelerator.parse_devices(devices))
    except (MisconfigurationException, TypeError, ValueError):
        return []
    return [device for device in found if isinstance(device, torch.device)]


def _accelerator(setting: str | Accelerator) -> Accelerator | None:
    """What Lightning takes for `trainer.accelerator`; None if it knows none of that name."""
    if isinstance(setting, Accelerator):
        return setting
    if setting in ("auto", "gpu"):
        gpus = {"mps": MPSAccelerator, "cuda": CUDAAccelerator}  # in Lightning's order
        setting = next((name for name, kind in gpus.items() if kind.is_available()), "cpu")
    found: Accelerator | None = AcceleratorRegistry.get(setting) if setting in AcceleratorRegistry else None
    return found


def _find_checkpoint(trainer: Mapping[str, Any], callbacks: Sequence[Callback], ckpt_path: str | None) -> str | None:
    """The checkpoint that Lightning will load, if it is on this machine."""
    root = os.fspath(trainer["default_root_dir"] or Path.cwd())
    logger = trainer["logger"]
    if logger is None or logger is True:  # where the default logger writes: a new directory, unless in a Slurm job
        logger = CSVLogger(root, version=SLURMEnvironment.job_id())
    of_trainer: Any = SimpleNamespace(
        callbacks=callbacks,
        checkpoint_callbacks=[callback for callback in callbacks if isinstance(callback, Checkpoint)],
        loggers=logger if isinstance(logger, list) else [logger] if logger else [],
        default_root_dir=root,
        fast_dev_run=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning will warn again
        try:
            found = found_checkpoint(of_trainer, ckpt_path)
        except ValueError:  # of what it will refuse again, such as "best" before there is a run
            return None
    return found if found and Path(found).exists() else None


def _read(checkpoint: str) -> str | None:
    """The precision of the run that wrote a checkpoint; None if it holds no record of it. Nothing is unpickled."""
    try:
        if is_sharded(checkpoint):
            states = model_states(checkpoint)
        else:
            states = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError):  # of another make, or broken: loading it will say so
        return None
    return recorded_precision(states.get("callbacks", {}))
