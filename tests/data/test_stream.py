"""Streams: tokenized while they are consumed, in constant memory, the same for everybody and after every kill."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lightprune.data import Source
from lightprune.data.order import BlockOrder
from lightprune.data.stream import BlockStream, TokenStream
from lightprune.errors import ConfigError
from tests.data.conftest import byte_tokenizer, tokens_of

DOCUMENTS = [f"document-{i}" + "x" * (i * 7 % 31) for i in range(3000)]
TOKENS = [token for document in DOCUMENTS for token in tokens_of(document)]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in three formats; `hub` is a folder that `datasets` streams as it does a hub's repository."""
    folder = tmp_path_factory.mktemp("streams")
    table = datasets.Dataset.from_dict({"text": DOCUMENTS})
    table.to_parquet(str(folder / "rows.parquet"))
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    (folder / "rows.txt").write_text("|".join(DOCUMENTS))
    (folder / "hub").mkdir()
    for part in range(6):
        rows = table.select(range(part * 500, part * 500 + 500))
        rows.to_parquet(str(folder / "hub" / f"train-{part}.parquet"))
    return folder


def sources(texts: Path) -> dict[str, Source]:
    return {
        "parquet": Source(files=str(texts / "rows.parquet"), streaming=True),
        "jsonl": Source(files=str(texts / "rows.jsonl"), streaming=True),
        "text": Source(files=str(texts / "rows.txt"), separator="|", streaming=True),
        "hub": Source(hub=str(texts / "hub"), streaming=True),
    }


def stream_of(source: Source, directory: Path) -> TokenStream:
    return TokenStream(source, byte_tokenizer(), domain="d", directory=directory)


def written(stream: TokenStream) -> list[int]:
    return stream.blocks(0, 1).tokens(0, stream.progress.tokens).tolist()


class Counted(Source):
    """A source that counts the documents that are read from it, and may fail at one of them."""

    read: list[int]

    @classmethod
    def of(cls, texts: list[str], fail_at: int | None = None) -> "Counted":
        source = cls(files="unused", streaming=True)
        source.__dict__.update(texts=texts, read=[], fail_at=fail_at)
        return source

    def documents(self, domain: str) -> Iterator[str]:
        for number, text in enumerate(self.__dict__["texts"]):
            if number == self.__dict__["fail_at"]:
                raise ConfigError("data.domains.d cannot be read on.")
            self.read.append(number)
            yield text


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text", "hub"])
def test_the_file_holds_the_documents_in_the_order_of_the_source(texts: Path, tmp_path: Path, kind: str) -> None:
    stream = stream_of(sources(texts)[kind], tmp_path)
    assert stream.ensure(10**9) == len(TOKENS)
    assert stream.progress.ended
    assert stream.progress.documents == len(DOCUMENTS)
    assert written(stream) == TOKENS


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_another_process_goes_on_behind_what_is_there(texts: Path, tmp_path: Path, kind: str) -> None:
    steps = (1, 100, 5000, 20_000, 20_001, 10**9)
    for tokens in steps:
        stream = stream_of(sources(texts)[kind], tmp_path)
        assert stream.ensure(tokens) >= min(tokens, len(TOKENS))
        assert written(stream) == TOKENS[: stream.progress.tokens]
    assert stream.progress.tokens == len(TOKENS)


def test_a_hub_data_set_goes_on_without_reading_what_lies_before(texts: Path, tmp_path: Path) -> None:
    source = Source(hub=str(tmp_path / "hub"), streaming=True)
    shutil.copytree(texts / "hub", tmp_path / "hub")
    beyond_four_parts = sum(len(tokens_of(text)) for text in DOCUMENTS[:2100])
    stream_of(source, tmp_path / "cache").ensure(beyond_four_parts)
    (tmp_path / "hub" / "train-1.parquet").write_bytes(b"never read again")
    stream = stream_of(source, tmp_path / "cache")
    assert stream.ensure(10**9) == len(TOKENS)
    assert written(stream) == TOKENS


def test_only_what_is_needed_is_read_and_no_more_than_twice_what_is_wanted_ahead(tmp_path: Path) -> None:
    source = Counted.of(["x" * 99] * 100_000)  # 100 tokens each
    stream = stream_of(source, tmp_path)
    stream.ensure(1000, ahead=20_000)
    stream._thread.shutdown(wait=True)
    assert 410 <= len(source.read) <= 410 + 64


def test_it_is_tokenized_ahead_of_who_asks(tmp_path: Path) -> None:
    stream = stream_of(Counted.of(["x" * 99] * 100_000), tmp_path)
    stream.ensure(1000, ahead=20_000)
    deadline = time.monotonic() + 30
    while stream._read_progress().tokens < 41_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    read = len(stream._source.read)
    assert stream.ensure(15_000, ahead=20_000) >= 41_000, "it is there already"
    assert len(stream._source.read) == read


def write_forever(source: Source, directory: Path) -> None:
    stream = stream_of(source, directory)
    for tokens in range(1, 10**9, 500):
        stream.ensure(tokens)


def test_a_killed_writer_leaves_nothing_wrong(texts: Path, tmp_path: Path) -> None:
    """Processes are killed in the middle of their work; each next one takes the lock and goes on."""
    context = multiprocessing.get_context("fork")
    reached = []
    for source in (sources(texts)["jsonl"],) * 6:
        process = context.Process(target=write_forever, args=(source, tmp_path))
        before = stream_of(source, tmp_path)._read_progress().tokens
        process.start()
        deadline = time.monotonic() + 30
        while stream_of(source, tmp_path)._read_progress().tokens < before + 4000 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        reached.append(stream_of(source, tmp_path)._read_progress().tokens)
    assert reached == sorted(set(reached)), "each has written something"
    with (tmp_path / "tokens.bin").open("ab") as file:
        file.write(b"\1\2\3")  # and a write that was cut short
    stream = stream_of(sources(texts)["jsonl"], tmp_path)
    assert stream.ensure(10**9) == len(TOKENS)
    assert written(stream) == TOKENS


def test_processes_share_one_file_and_one_of_them_reads_the_source(tmp_path: Path) -> None:
    """Two ranks in step, as two streams of one process with locks of their own."""
    pair = [Counted.of(DOCUMENTS), Counted.of(DOCUMENTS)]
    streams = [stream_of(source, tmp_path) for source in pair]
    found: list[list[int]] = [[], []]

    def consume(rank: int) -> None:
        for tokens in range(1000, len(TOKENS) + 1000, 1000):
            found[rank].append(min(tokens, streams[rank].ensure(tokens, ahead=2000)))

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found[0] == found[1]
    assert written(streams[0]) == TOKENS
    assert all(source.read == sorted(set(source.read)) for source in pair), "nobody reads anything twice"


def test_a_slow_writer_is_not_waited_for_by_a_run_that_is_further(tmp_path: Path) -> None:
    slow, fast = (stream_of(Counted.of(DOCUMENTS), tmp_path) for _ in range(2))
    slow.ensure(100)
    assert fast.ensure(30_000) >= 30_000
    assert slow.ensure(40_000) >= 40_000
    assert written(slow) == TOKENS[: slow.progress.tokens]


def test_what_goes_wrong_in_the_background_reaches_who_waits_and_is_no_end(tmp_path: Path) -> None:
    source = Counted.of(DOCUMENTS, fail_at=640)
    stream = stream_of(source, tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^data.domains.d cannot be read on\.$"):
            stream.ensure(10**9)
    source.__dict__["fail_at"] = None
    assert stream.ensure(10**9) == len(TOKENS)
    assert written(stream) == TOKENS


def test_a_stream_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.domains.d is empty: none of its 2 documents holds any text\.$"):
        stream_of(Counted.of(["", " \n"]), tmp_path).ensure(1)


def test_a_field_that_is_not_there_is_named(texts: Path, tmp_path: Path) -> None:
    source = Source(hub=str(texts / "hub"), text="content", streaming=True)
    with pytest.raises(ConfigError, match=r"^data.domains.d.text is 'content', but the data set has only: text\.$"):
        stream_of(source, tmp_path).ensure(1)


def order_by_hand(cursor: int, *, count: int, window: int, seed: int, domain: int) -> int:
    """The documented formula for a stream whose length is known."""
    epoch, place = cursor // count, cursor % count
    number, offset = place // window, place % window
    here = min(window, count - number * window)
    permutation = np.random.default_rng([seed, domain, epoch, number]).permutation(here)
    return number * window + int(permutation[offset])


@pytest.mark.parametrize("max_blocks", [None, 100, 64, 5])
def test_the_order_of_a_stream_equals_its_formula(texts: Path, tmp_path: Path, max_blocks: int | None) -> None:
    start, size, window = 37, 200, 16
    count = min((len(TOKENS) - start) // size, max_blocks or 10**9)

    def supply() -> BlockStream:
        tokens = stream_of(sources(texts)["parquet"], tmp_path)
        return BlockStream(tokens, start, size, max_blocks, window)

    blocks = supply()
    order = BlockOrder(blocks, seed=3, domain=1)
    found = [order(cursor) for cursor in range(3 * count)]
    assert found == [order_by_hand(c, count=count, window=window, seed=3, domain=1) for c in range(3 * count)]
    for epoch in range(3):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert blocks.count == count
    for cursor in (0, count - 1, count, 2 * count + 3):  # a resume, with all of it in the cache
        assert BlockOrder(supply(), seed=3, domain=1)(cursor) == found[cursor]
    assert blocks.blocks[count - 1].tolist() == TOKENS[start + (count - 1) * size : start + count * size]


def test_a_resume_without_the_cache_reads_the_stream_again(texts: Path, tmp_path: Path) -> None:
    def order(cache: str) -> BlockOrder:
        tokens = stream_of(sources(texts)["hub"], tmp_path / cache)
        return BlockOrder(BlockStream(tokens, 0, 500, None, 8), seed=0, domain=0)

    whole = order("one")
    found: list[Any] = [whole(cursor) for cursor in range(250)]
    for cursor in (30, 249):
        assert order(f"fresh-{cursor}")(cursor) == found[cursor]
