"""Tokens of a source that is too large to tokenize up front: a file that grows while training consumes it."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from lightprune.data.blocks import StreamedBlocks, ends_path
from lightprune.data.bos import Bos
from lightprune.data.documents import DocumentStream
from lightprune.data.sources import Source
from lightprune.data.tokens import BATCH, DocumentEncoder, no_text

WINDOW = 1024
"""How many neighboring blocks of a stream are shuffled together. As many are tokenized ahead of training, or twice."""

STREAM_EPOCH = 2**20
"""What a stream counts for in the length of an epoch, in blocks, unless `max_blocks` limits it: its size is unknown."""

_COMMIT = 2**16  # tokens
_POLL = 0.02  # seconds
_END = np.dtype(np.int64)


@dataclass(frozen=True)
class Progress:
    """How far a stream has been tokenized.

    Attributes:
        tokens: In the file.
        documents: Read from the source, blank ones included.
        place: Where the source goes on, if it can say so: see `DocumentStream.place`.
        ended: Whether there are no more documents.
        filled: Documents that are in the file, if it is noted where these end.
    """

    tokens: int = 0
    documents: int = 0
    place: dict[str, object] | None = None
    ended: bool = False
    filled: int = 0


class TokenStream:
    """The tokens of a streaming domain, in the order of the source, in a directory of the cache.

    `tokens.bin` holds the tokens, every document closed by EOS; `progress.json` says how many of them count. Where
    documents open with BOS, `ends.bin` holds the position after each document, as int64. What lies behind the tokens
    that count, a killed process has left, and the next one writes over it. The order is that of the source, so the file
    is the same whoever writes it, in however many goes; what one run has tokenized is there for the next.

    Processes that share the directory take turns under a lock that the operating system takes from a process that dies.
    Who has read the source so far goes on tokenizing in the background, so usually one process does all of it; another
    one steps in only when it would have to wait and nobody writes.

    Args:
        source: The domain's text.
        tokenizer: Must have an EOS token.
        domain: For the error messages.
        directory: From `cache_entry`.
        bos: What every document begins with; None for whatever the text has there.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        *,
        domain: str,
        directory: Path,
        bos: Bos | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "tokens.bin"
        self.eos: int = tokenizer.eos_token_id
        self.bos = bos
        self.progress = Progress()
        self._source = source
        self._encode = DocumentEncoder(tokenizer, bos)
        self._domain = domain
        self._directory = directory
        self._documents: DocumentStream | None = None
        self._lock = FileLock(directory / "lock")
        self._thread = ThreadPoolExecutor(1)
        self._job: Future[None] | None = None

    def blocks(self, start: int, size: int) -> StreamedBlocks:
        """Blocks of `size` tokens, from token `start` on."""
        return StreamedBlocks(self.path, start, size, self._encode.dtype.str, self.bos)

    def ensure(self, tokens: int, *, ahead: int = 0) -> int:
        """Waits until there are that many tokens, or the stream has ended, and returns how many there are.

        Args:
            tokens: What is needed now.
            ahead: How many more should be there before long. The process that writes keeps between once and twice as
                many in advance.

        Raises:
            ConfigError: The source cannot be read, or holds no text.
        """
        goal = tokens + 2 * ahead
        if self._short_of(tokens + ahead):
            self.progress = self._read_progress()
        while self._short_of(tokens):
            wait([self._tokenize(goal)], timeout=_POLL)
            self.progress = self._read_progress()
        if self._documents is not None and self._short_of(tokens + ahead):
            self._tokenize(goal)
        return self.progress.tokens

    def _short_of(self, tokens: int) -> bool:
        return self.progress.tokens < tokens and not self.progress.ended

    def _tokenize(self, goal: int) -> "Future[None]":
        """The background job: the one that runs already, or a new one that tokenizes up to `goal` tokens."""
        if self._job is not None and self._job.done():
            done, self._job = self._job, None
            done.result()  # raises what went wrong
        if self._job is None:
            self._job = self._thread.submit(self._write, goal)
        return self._job

    def _write(self, goal: int) -> None:
        try:
            with self._lock.acquire(timeout=0):
                self._append(self._read_progress(), goal)
        except Timeout:  # another process writes
            time.sleep(_POLL)
        except Exception:
            self._documents = None  # a generator that has raised looks like one that has ended
            raise

    def _append(self, progress: Progress, goal: int) -> None:
        documents = self._documents_behind(progress)
        committed = progress.tokens
        with ExitStack() as stack:
            file = stack.enter_context(_behind(self.path, progress.tokens * self._encode.dtype.itemsize))
            files, ends = [file], None
            if self.bos is not None:
                ends = stack.enter_context(_behind(ends_path(self.path), progress.filled * _END.itemsize))
                files.append(ends)
            while progress.tokens < goal and not progress.ended:
                texts = list(islice(documents, BATCH))
                for tokens in self._encode(texts):
                    file.write(tokens.tobytes())
                    progress = replace(progress, tokens=progress.tokens + len(tokens))
                    if ends is not None:
                        ends.write(np.array(progress.tokens, _END).tobytes())
                        progress = replace(progress, filled=progress.filled + 1)
                progress = replace(progress, documents=documents.read, place=documents.place, ended=len(texts) < BATCH)
                if progress.tokens >= committed + _COMMIT:
                    self._commit(files, progress)
                    committed = progress.tokens
            if progress.ended and not progress.tokens:
                raise no_text(self._domain, progress.documents)
            self._commit(files, progress)

    def _documents_behind(self, progress: Progress) -> DocumentStream:
        """The source's documents after those that are tokenized, perhaps by another process in the meantime."""
        if self._documents is None or self._documents.read > progress.documents:
            self._documents = DocumentStream(self._source, self._domain, progress.documents, progress.place)
        self._documents.skip_to(progress.documents)
        return self._documents

    def _commit(self, files: Sequence[BinaryIO], progress: Progress) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())  # a committed token must not be lost, whatever the machine does next
        draft = self._directory / "progress.draft"
        draft.write_text(json.dumps(asdict(progress)))
        draft.replace(self._directory / "progress.json")

    def _read_progress(self) -> Progress:
        try:
            return Progress(**json.loads((self._directory / "progress.json").read_text()))
        except FileNotFoundError:
            return Progress()


@contextmanager
def _behind(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file to append to what its first `size` bytes are."""
    with path.open("ab") as file:
        file.truncate(size)
        yield file


@dataclass(frozen=True)
class BlockStream:
    """The training blocks of a streaming domain, as a `Supply`.

    Attributes:
        tokens: The domain's tokens.
        start: The token that they begin at.
        size: Tokens in a block.
        max_blocks: At most that many blocks; None for all.
        window: How many neighboring blocks are shuffled together.
        text: What tells them from other blocks.
    """

    tokens: TokenStream
    start: int
    size: int
    max_blocks: int | None
    window: int
    text: str = ""

    @cached_property
    def blocks(self) -> StreamedBlocks:
        """What workers read the blocks from."""
        return self.tokens.blocks(self.start, self.size)

    @property
    def count(self) -> int | None:
        there = self._limited(self.blocks.complete(self.tokens.progress.tokens))
        return there if self.tokens.progress.ended or there == self.max_blocks else None

    @property
    def nominal(self) -> int:
        return self.max_blocks or STREAM_EPOCH

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "block_size": self.size,
            "max_blocks": self.max_blocks,
            "window": self.window,
            "text": self.text,
        } | ({} if self.tokens.bos is None else {"bos": self.tokens.bos.token})

    def ensure(self, count: int) -> int:
        wanted = self._limited(count)
        ahead = self._limited(count + self.window) - wanted
        tokens = self.tokens.ensure(self.start + wanted * self.size, ahead=ahead * self.size)
        return min(wanted, self.blocks.complete(tokens))

    def _limited(self, count: int) -> int:
        return count if self.max_blocks is None else min(count, self.max_blocks)
