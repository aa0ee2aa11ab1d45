"""Reading the directories that DeepSpeed saves, safely and without an engine or a GPU.

Lightning saves under the tag "checkpoint": one file of model states (under stage 3 one for each rank, and without
weights), and for each rank one of optimizer states, which holds its part of the weights in full precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightprune.errors import ConfigError
from lightprune.integrations.lightning import shadow_method

_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a directory of DeepSpeed's."""
    return Path(path).is_dir()


def model_states(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says beside the parts of the ranks: the callbacks' states, the weights if they are whole.

    Raises:
        ConfigError: there is no such checkpoint at `path`.
    """
    folder = _folder(path)
    for name in _MODEL_STATES:
        if (folder / name).is_file():
            return _load(folder / name, mmap=True)
    raise ConfigError(f"There is no DeepSpeed checkpoint at {str(path)!r}: it has no {folder.name}/{_MODEL_STATES[0]}.")


def whole_checkpoint(path: str | Path) -> dict[str, object]:
    """A checkpoint as Lightning saves it elsewhere: with `state_dict`, all weights under their names, tied ones too."""
    states = model_states(path)
    weights = dict(states.pop("module"))
    if any(tensor.numel() == 0 for tensor in weights.values()):  # stage 3
        weights |= _trained(_folder(path), states) | _frozen(_folder(path), states)
    for tied, name in states["shared_params"].items():
        weights[tied] = weights[name]
    return {**states, "state_dict": weights}


def _trained(folder: Path, states: dict[str, Any]) -> dict[str, Tensor]:
    """The trained weights in full precision, from the parts of all ranks: each has an equal part of each, padded."""
    shapes = {name: shape for group in states["param_shapes"] for name, shape in group.items()}
    files = _of_ranks(folder, "*_optim_states.pt")
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for file in files:
        flat = torch.cat([tensor.flatten() for tensor in _load(file)["optimizer_state_dict"]["fp32_flat_groups"]])
        offset = 0
        for name, shape in shapes.items():
            length = -(-shape.numel() // len(files))
            parts[name].append(flat[offset : offset + length].clone())
            offset += length
    return {name: torch.cat(parts.pop(name))[: shape.numel()].view(shape) for name, shape in shapes.items()}


def _frozen(folder: Path, states: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that no optimizer has, in the same way from the ranks' model states."""
    shapes = states.get("frozen_param_shapes") or {}
    parts = [_load(file)["frozen_param_fragments"] for file in _of_ranks(folder, "*_model_states.pt")] if shapes else []
    return {
        name: torch.cat([part[name].flatten() for part in parts])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def _of_ranks(folder: Path, pattern: str) -> list[Path]:
    """The files of all ranks, in their order."""
    return sorted(folder.glob(pattern), key=lambda file: int(file.name.split("zero_pp_rank_")[1].split("_")[0]))


@contextmanager
def safe_loading(engine: Any) -> Iterator[None]:
    """Let an engine read checkpoints without running what they might contain."""
    restore = shadow_method(engine.checkpoint_engine, "load", lambda original, path, map_location=None: _load(path))
    try:
        yield
    finally:
        restore()


def _load(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    with torch.serialization.safe_globals(_plain_classes()):
        loaded: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return loaded


def _plain_classes() -> list[Any]:
    """What deepspeed writes into its files beside tensors and plain values: enums and the like, no code."""
    if find_spec("deepspeed") is None:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _folder(path: str | Path) -> Path:
    latest = Path(path, "latest")
    return Path(path, latest.read_text().strip() if latest.is_file() else "checkpoint")
