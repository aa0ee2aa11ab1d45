"""What a teacher said of the tokens that it finds likeliest, kept on disk: one pass over a text, and then none.

Shapes: B sequences, T tokens each, k tokens that the teacher finds likeliest.
"""

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightprune.distillation.kl import Likeliest

ROWS_A_FILE = 256
"""So many sequences are held on the device before they are written: the device is waited for once in so many."""


class TeachingCache:
    """The teacher's answers, by sequence: what the decoder is given of a sequence is the key of its tokens' answers.

    A batch is known by its tensors on the CPU, before they are sent to a device, so that looking up waits for nothing.
    If the model is then called with other tensors than those of the batch, nothing is found, and nothing is kept.

    Args:
        folder: holds the answers of one teacher; files are only ever added, by any number of processes.
        names: of the decoder's inputs, those that a batch may hold.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self._names = tuple(sorted(names))
        self._places: dict[bytes, tuple[Path, int, int]] = {}  # file, first and last token of its answers in there
        self._keys: list[bytes] = []  # of the batch's sequences
        self._sent: dict[str, Tensor] = {}  # the batch's tensors on the device
        self._said: list[Likeliest] = []  # of this batch, piece by piece
        self._new: list[tuple[list[bytes], Likeliest]] = []  # not written yet
        for path in sorted(folder.glob("*.safetensors")):
            self._read(path)

    def __len__(self) -> int:
        """How many sequences are known."""
        return len(self._places)

    def expect(self, batch: Mapping[str, object]) -> None:
        """A batch is about to be sent to the device."""
        tensors = self._of(batch)
        rows = {len(tensor) for tensor in tensors.values()}
        self._keys = _keys(tensors) if "input_ids" in tensors and len(rows) == 1 else []

    def sent(self, batch: Mapping[str, object]) -> None:
        """The same batch, on the device."""
        self._sent = self._of(batch)

    def is_of_batch(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the decoder was called with the batch's own tensors, and no others."""
        same = (
            name in self._sent
            and self._sent[name].data_ptr() == tensor.data_ptr()
            and self._sent[name].shape == tensor.shape
            for name, tensor in inputs.items()
        )
        return bool(self._keys) and set(inputs) == set(self._sent) and all(same)

    def find(self, inputs: Mapping[str, Tensor]) -> Likeliest | None:
        """What the teacher said of the batch's tokens, [B x T, k] on the inputs' device; None if it is not known."""
        if not self.is_of_batch(inputs) or not all(key in self._places for key in self._keys):
            return None
        device = inputs["input_ids"].device
        tokens, log_probs = zip(*(self._load(*self._places[key]) for key in self._keys), strict=True)
        return Likeliest(_sent(torch.cat(tokens), device), _sent(torch.cat(log_probs), device))

    def note(self, likeliest: Likeliest) -> Likeliest:
        """Take down what the teacher says of the next tokens of the batch."""
        self._said.append(likeliest)
        return likeliest

    def keep(self, inputs: Mapping[str, Tensor]) -> None:
        """Keep what was taken down, if it is of the batch."""
        said, self._said = self._said, []
        if not said or not self.is_of_batch(inputs):
            return
        tokens, log_probs = (torch.cat(parts) for parts in zip(*said, strict=True))
        self._new.append((self._keys, Likeliest(tokens.int(), log_probs)))
        if sum(len(keys) for keys, _ in self._new) >= ROWS_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._new:
            return
        keys = [key for of_batch, _ in self._new for key in of_batch]
        lengths = [len(said.tokens) // len(of_batch) for of_batch, said in self._new for _ in of_batch]
        tensors = {
            "keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
            "ends": torch.tensor(lengths).cumsum(0),
            "tokens": torch.cat([said.tokens for _, said in self._new]).cpu(),
            "log_probs": torch.cat([said.log_probs for _, said in self._new]).cpu(),
        }
        self._new = []
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        save_file(tensors, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        self._read(path)

    def _of(self, batch: Mapping[str, object]) -> dict[str, Tensor]:
        found = {name: batch.get(name) for name in self._names}
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.ndim >= 1}

    def _read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            keys, ends = file.get_tensor("keys"), file.get_tensor("ends").tolist()
        for key, start, end in zip(keys, [0, *ends], ends, strict=False):
            self._places[bytes(key.tolist())] = (path, start, end)

    def _load(self, path: Path, start: int, end: int) -> tuple[Tensor, Tensor]:
        file = _opened(path)
        return file.get_slice("tokens")[start:end], file.get_slice("log_probs")[start:end]


@lru_cache(maxsize=64)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _keys(tensors: Mapping[str, Tensor]) -> list[bytes]:
    """For each sequence, a hash of its rows of all tensors."""
    rows = len(tensors["input_ids"])
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(rows)]
    for name, tensor in tensors.items():
        for row, digest in zip(tensor.cpu().long().numpy(), hashes, strict=True):
            digest.update(name.encode())
            digest.update(row.tobytes())
    return [digest.digest() for digest in hashes]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To a device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
