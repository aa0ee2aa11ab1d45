"""Fixed-length blocks of tokens: the split into training and validation, and the data set that batches come from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightprune.data.readers import key_of
from lightprune.data.tokens import TokenCache
from lightprune.errors import ConfigError
from lightprune.metrics import IGNORE_INDEX

PADDING = -1
"""The block of a sample that fills up a rank's share: all its labels are ignored."""


def fingerprint(tokens: NDArray[Any]) -> str:
    """A short hash of tokens."""
    return hashlib.sha256(tokens.astype(np.int64).tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Blocks:
    """`count` consecutive blocks of `size` tokens in a token file, from token `start` on.

    It travels to worker processes as these four values, never with the tokens.
    """

    path: Path
    start: int
    count: int
    size: int

    @cached_property
    def array(self) -> NDArray[Any]:
        """[count, size], a read-only memory map."""
        tokens = np.load(self.path, mmap_mode="r")
        return np.asanyarray(tokens[self.start : self.start + self.count * self.size].reshape(-1, self.size))

    def __getitem__(self, block: int) -> NDArray[Any]:
        """[size], the tokens of one block."""
        return np.asanyarray(self.array[block])

    @property
    def fingerprint(self) -> str:
        """A hash of the first, the middle and the last block."""
        return fingerprint(self.array[[0, self.count // 2, self.count - 1]])

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StreamedBlocks:
    """Blocks of `size` tokens in a file of bare tokens that is still growing, from token `start` on.

    It holds neither the tokens nor a map of the file, so what has been appended meanwhile can be read.
    """

    path: Path
    start: int
    size: int
    dtype: str

    def __getitem__(self, block: int) -> NDArray[Any]:
        """[size], the tokens of one block."""
        first = self.start + block * self.size
        return np.fromfile(self.path, self.dtype, self.size, offset=first * np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Split:
    """A domain's blocks for training and for validation: disjoint, and together all of its tokens but `dropped`.

    Attributes:
        by_document: Whether the split falls between two documents, or inside one.
        dropped: Tokens of the two tails that do not fill a block; fewer than two blocks in all.
    """

    train: Blocks
    validation: Blocks
    by_document: bool
    dropped: int

    def limited(self, max_blocks: int | None) -> "Split":
        """The same split with at most that many training blocks."""
        if max_blocks is None or max_blocks >= self.train.count:
            return self
        return replace(self, train=replace(self.train, count=max_blocks))


def split_point(ends: NDArray[np.int64], *, block_size: int, validation_blocks: int) -> tuple[int, bool]:
    """Where the validation tokens begin, and whether that is the beginning of a document.

    It is the last document boundary that leaves at least `validation_blocks` blocks to its right. Where documents are
    so long that this would hold out more than twice what was asked for, or leave no block to train on, the split falls
    inside a document: exactly the last `validation_blocks` blocks are held out.

    Args:
        ends: [documents], the position after each document.
        block_size: Tokens in a block.
        validation_blocks: At least 1, and fewer than there are blocks.
    """
    total = int(ends[-1])
    wanted = validation_blocks * block_size
    starts = np.concatenate([[0], ends[:-1]])
    boundary = int(starts[np.searchsorted(starts, total - wanted, side="right") - 1])
    if total - boundary <= 2 * wanted and boundary >= block_size:
        return boundary, True
    return (total // block_size - validation_blocks) * block_size, False


def split_blocks(cache: TokenCache, *, block_size: int, validation: int | float, domain: str) -> Split:
    """Cuts a domain into blocks of `block_size` tokens and holds some of them out.

    Args:
        cache: The domain's tokens.
        block_size: Tokens in a block.
        validation: Held out at least: a share of the blocks (float), or a number of blocks (int).
        domain: For the error messages.

    Raises:
        ConfigError: The text does not fill one block for training and one for validation, or `validation` asks for
            all of it.
    """
    ends = cache.ends
    tokens = int(ends[-1])
    blocks = tokens // block_size
    if blocks < 2:
        raise ConfigError(
            f"{key_of(domain)} has {tokens} tokens, fewer than two blocks of {block_size} (one to train on, one "
            "to validate on): give it more text, or lower data.block_size."
        )
    wanted = validation if isinstance(validation, int) else max(1, round(validation * blocks))
    if wanted >= blocks:
        raise ConfigError(
            f"data.validation is {validation}, which holds out all {blocks} blocks of {key_of(domain)}: lower it."
        )
    start, by_document = split_point(ends, block_size=block_size, validation_blocks=wanted)
    path = cache.directory / "tokens.npy"
    train = Blocks(path, 0, start // block_size, block_size)
    held_out = Blocks(path, start, (tokens - start) // block_size, block_size)
    dropped = tokens - (train.count + held_out.count) * block_size
    return Split(train, held_out, by_document, dropped)


class BlockDataset(Dataset[dict[str, Tensor]]):
    """The blocks of all domains. A sample is named by its domain and its block in there.

    It holds `input_ids`, `attention_mask` and `labels`, [T] int64 each, and `domain`, [] int64.
    The block `PADDING` gives a sample whose labels are all ignored.
    """

    def __init__(self, domains: Sequence[Blocks | StreamedBlocks]) -> None:
        self.domains = list(domains)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Tensor]:
        domain, block = sample
        tokens = torch.from_numpy(self.domains[domain][max(block, 0)].astype(np.int64))
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.full_like(tokens, IGNORE_INDEX) if block == PADDING else tokens,
            "domain": torch.tensor(domain),
        }


class OrderedSampler(DistributedSampler[tuple[int, int]]):
    """Every block once and in order, dealt over the ranks.

    Ranks get equally many, so that collective operations match; what is missing for that is `PADDING`, which no
    token-weighted metric counts. (`DistributedSampler` repeats samples instead, and they would count twice.) It comes
    first, where a batch has other samples beside it: the mean loss of a batch without any label is not a number.

    Args:
        counts: The number of blocks of each domain.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(self, counts: Sequence[int], *, num_replicas: int, rank: int) -> None:
        samples: Any = range(sum(counts))
        super().__init__(samples, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.counts = list(counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        padding = repeat((0, PADDING), self.total_size - sum(self.counts))
        samples = ((domain, block) for domain, count in enumerate(self.counts) for block in range(count))
        return islice(chain(padding, samples), self.rank, None, self.num_replicas)
