"""Fixed-length blocks of tokens: the split into training and validation, and the data set that batches come from."""

import hashlib
from bisect import bisect_left, bisect_right
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

from lightprune.data.bos import BlockStarts, Bos, bos_places
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

    It travels to worker processes as these values, never with the tokens.

    Attributes:
        bos: What every block begins with; None for whatever the text has there.
        whole: The blocks that begin with a BOS of the text: see `BlockStarts`.
    """

    path: Path
    start: int
    count: int
    size: int
    bos: Bos | None = None
    whole: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self._starts(self.count)

    def __getitem__(self, block: int) -> NDArray[Any]:
        """[size], the tokens of one block."""
        return self._starts.read(block, lambda first, count: np.asanyarray(self._tokens[first : first + count]))

    @property
    def fingerprint(self) -> str:
        """A hash of the first, the middle and the last block."""
        return fingerprint(np.stack([self[0], self[self.count // 2], self[self.count - 1]]))

    @cached_property
    def _starts(self) -> BlockStarts:
        return BlockStarts(self.start, self.size, self.bos, list(self.whole))

    @cached_property
    def _tokens(self) -> NDArray[Any]:
        return np.asanyarray(np.load(self.path, mmap_mode="r"))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StreamedBlocks:
    """Blocks of `size` tokens in a file of bare tokens that is still growing, from token `start` on.

    It holds neither the tokens nor a map of the file, so what has been appended meanwhile can be read.

    Attributes:
        bos: What every block begins with; None for whatever the text has there. With it, a file `ends.bin` lies beside
            the tokens and grows with them: the position after each document, as int64.
    """

    path: Path
    start: int
    size: int
    dtype: str
    bos: Bos | None = None

    def __getitem__(self, block: int) -> NDArray[Any]:
        """[size], the tokens of one block."""
        return self._starts_up_to(self._latest(block)).read(block, self.tokens)

    def complete(self, tokens: int) -> int:
        """How many blocks the first `tokens` tokens of the text fill, which must be in the file."""
        return self._starts_up_to(tokens).complete(tokens)

    def begin(self, block: int) -> int:
        """The position of the first token of the text in a block, which must be in the file."""
        return self._starts_up_to(self._latest(block))(block)

    def tokens(self, first: int, count: int) -> NDArray[Any]:
        """[count], tokens of the text from position `first` on."""
        return np.fromfile(self.path, self.dtype, count, offset=first * np.dtype(self.dtype).itemsize)

    def _latest(self, block: int) -> int:
        """The last position that a block can begin at."""
        return self.start + block * self.size

    def _starts_up_to(self, position: int) -> BlockStarts:
        """Where the blocks begin, with all BOS tokens up to `position` noted that are in the file."""
        if self.bos is not None and self._noted.end <= position:
            self._noted.read_on(self.path)
        return self._noted.starts

    @cached_property
    def _noted(self) -> "_Noted":
        return _Noted(BlockStarts(self.start, self.size, self.bos))

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class _Noted:
    """The documents of a stream that `starts` knows of: how many, and where the last one ends."""

    starts: BlockStarts
    documents: int = 0
    end: int = 0

    def read_on(self, path: Path) -> None:
        """Notes the documents that have been appended."""
        itemsize = np.dtype(np.int64).itemsize
        ends = np.fromfile(ends_path(path), np.int64, offset=self.documents * itemsize)
        if len(ends):
            self.starts.extend(bos_places(ends, self.starts.bos, first=self.end))
            self.documents, self.end = self.documents + len(ends), int(ends[-1])


def ends_path(tokens: Path) -> Path:
    """The file beside a stream's tokens that holds the position after each document, as int64."""
    return tokens.with_name("ends.bin")


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


def split_point(
    ends: NDArray[np.int64], *, block_size: int, validation_blocks: int, bos: Bos | None = None
) -> tuple[int, bool]:
    """Where the validation tokens begin, and whether that is the beginning of a document.

    It is the last document boundary that leaves at least `validation_blocks` blocks to its right. Where documents are
    so long that this would hold out more than twice what was asked for, or leave no block to train on, the split falls
    inside a document: exactly the last `validation_blocks` blocks are held out.

    Args:
        ends: [documents], the position after each document.
        block_size: Tokens in a block.
        validation_blocks: At least 1, and fewer than there are blocks.
        bos: What every block begins with; None for whatever the text has there.
    """
    total = int(ends[-1])
    starts = np.concatenate([[0], ends[:-1]])
    fewest = block_size if bos is None else block_size - 1  # tokens of the text in a block

    def lacking(document: int) -> int:
        return -starts_from(int(starts[document]), ends, block_size, bos).complete(total)

    # A part that begins further to the left never has fewer blocks, with BOS too. Only those between the two bounds
    # have to be counted: none where there is no BOS.
    most_tokens, fewest_tokens = total - validation_blocks * block_size, total - validation_blocks * fewest
    low, high = (int(np.searchsorted(starts, tokens, side="right")) for tokens in (most_tokens, fewest_tokens))
    boundary = int(starts[bisect_right(range(len(starts)), -validation_blocks, low, high, key=lacking) - 1])
    if total - boundary <= 2 * validation_blocks * fewest and boundary >= block_size:
        return boundary, True
    whole = starts_from(0, ends, block_size, bos)
    return whole(whole.complete(total) - validation_blocks), False


def starts_from(start: int, ends: NDArray[np.int64], block_size: int, bos: Bos | None) -> BlockStarts:
    """Where the blocks begin from token `start` on."""
    starts = BlockStarts(start, block_size, bos)
    document = int(np.searchsorted(ends, start, side="right"))  # the first one that ends behind `start`
    starts.extend(bos_places(ends[document:], bos, first=int(ends[document - 1]) if document else 0))
    return starts


def split_blocks(
    cache: TokenCache, *, block_size: int, validation: int | float, domain: str, bos: Bos | None = None
) -> Split:
    """Cuts a domain into blocks of `block_size` tokens and holds some of them out.

    Args:
        cache: The domain's tokens.
        block_size: Tokens in a block.
        validation: Held out at least: a share of the blocks (float), or a number of blocks (int).
        domain: For the error messages.
        bos: What every block begins with, and every document of the cache; None for none.

    Raises:
        ConfigError: The text does not fill one block for training and one for validation, or `validation` asks for
            all of it.
    """
    ends = cache.ends
    tokens = int(ends[-1])
    blocks = starts_from(0, ends, block_size, bos).complete(tokens)
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
    start, by_document = split_point(ends, block_size=block_size, validation_blocks=wanted, bos=bos)
    train, held_out = (
        _blocks_between(cache, first, last, block_size, bos) for first, last in ((0, start), (start, tokens))
    )
    return Split(train, held_out, by_document, dropped=start - train.end + tokens - held_out.end)


def _blocks_between(cache: TokenCache, first: int, last: int, block_size: int, bos: Bos | None) -> Blocks:
    starts = starts_from(first, cache.ends, block_size, bos)
    count = starts.complete(last)
    whole = tuple(starts.whole[: bisect_left(starts.whole, count)])
    return Blocks(cache.directory / "tokens.npy", first, count, block_size, bos, whole)


class BlockDataset(Dataset[dict[str, Tensor]]):
    """The blocks of all domains. A sample is named by its domain and its block in there.

    It holds `input_ids`, `attention_mask` and `labels`, [T] int64 each, and `domain`, [] int64. The labels are the
    tokens, except that BOS is ignored, unless it is the EOS as well: the tokenizer puts it there, and no model has to
    predict it. The block `PADDING` gives a sample whose labels are all ignored.
    """

    def __init__(self, domains: Sequence[Blocks | StreamedBlocks]) -> None:
        self.domains = list(domains)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Tensor]:
        domain, block = sample
        blocks = self.domains[domain]
        tokens = torch.from_numpy(blocks[max(block, 0)].astype(np.int64))
        if block == PADDING:
            labels = torch.full_like(tokens, IGNORE_INDEX)
        elif blocks.bos is None or blocks.bos.is_eos:
            labels = tokens
        else:
            labels = tokens.masked_fill(tokens == blocks.bos.token, IGNORE_INDEX)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": labels,
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
