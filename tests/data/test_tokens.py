import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightprune.data import Source
from lightprune.data.stream import TokenStream
from lightprune.data.tokens import cache_entry, cache_root, tokenize_once, tokenizer_identity
from lightprune.errors import ConfigError
from tests.data.conftest import EOS, byte_tokenizer, tokens_of


class Listed(Source):
    """A source whose documents a test writes down, and that counts how often it is read."""

    lines: list[str]
    reads: int

    @classmethod
    def of(cls, lines: list[str]) -> "Listed":
        source = cls(builtin="bible")
        source.__dict__.update(lines=lines, reads=0)
        return source

    def documents(self, domain: str) -> Iterator[str]:
        self.__dict__["reads"] += 1
        yield from self.lines


def documents_in(tokens: np.ndarray) -> list[list[int]]:
    """The documents of a token stream, by a plain loop over it."""
    found: list[list[int]] = [[]]
    for token in tokens.tolist():
        found[-1].append(token)
        if token == EOS:
            found.append([])
    assert found.pop() == []
    return found


def test_every_document_is_there_once_and_closed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [f"document-{i}" + "x" * (i % 7) for i in range(200)]
    lines.insert(3, "  \n")
    lines.insert(70, "")
    cache = tokenize_once(Listed.of(lines), tokenizer, domain="d", directory=tmp_path / "e")
    found = documents_in(cache.tokens)
    expected = [tokens_of(line) for line in lines if line.strip()]
    assert sorted(found) == sorted(expected)
    assert found != expected, "the order must be mixed, or a suffix is no fair sample"
    assert cache.ends.tolist() == np.cumsum([len(document) for document in found]).tolist()
    assert cache.blank == 2
    assert cache.tokens.dtype == np.uint16
    assert isinstance(cache.tokens, np.memmap)
    assert not cache.tokens.flags.writeable


def test_the_order_is_the_same_everywhere(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [f"document-{i}" for i in range(50)]
    first, second = (tokenize_once(Listed.of(lines), tokenizer, domain="d", directory=tmp_path / name) for name in "ab")
    assert first.tokens.tolist() == second.tokens.tolist()


def test_the_cache_is_used_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = Listed.of(["one", "two"])
    for _ in range(3):
        tokenize_once(source, tokenizer, domain="d", directory=tmp_path / "e")
    assert source.reads == 1


def test_the_entry_depends_on_text_and_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "x.txt"
    path.write_text("abc")

    def entry(tokenizer: PreTrainedTokenizerFast, **options: str) -> Path:
        source = Source(files=str(path), **options)
        return cache_entry(tmp_path, source, tokenizer_identity(tokenizer), domain="d")

    first = entry(tokenizer)
    tokenizer(["a", "bcd"], padding=False, truncation=True, max_length=2)  # leaves its traces in the tokenizer
    assert entry(tokenizer) == entry(byte_tokenizer()) == first
    other = byte_tokenizer()
    other.add_tokens(["abc"])
    assert entry(other) != first
    other = byte_tokenizer()
    other.eos_token = "a"
    assert entry(other) != first
    assert entry(tokenizer, separator="b") != first
    path.write_text("abcd")
    assert entry(tokenizer) != first


@pytest.mark.parametrize("streaming", [False, True])
def test_token_ids_that_lie_far_apart(tmp_path: Path, streaming: bool) -> None:
    """Few tokens, but ids beyond 16 bits: the vocabulary's size says nothing about them."""
    vocabulary = {"<eos>": 0, "a": 1, "b": 65_536, "c": 200_000}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sparse = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    assert len(sparse) < 10
    (tmp_path / "x.txt").write_text("a b c")
    source = Source(files=str(tmp_path / "x.txt"), streaming=streaming)
    if streaming:
        stream = TokenStream(source, sparse, domain="d", directory=tmp_path / "e")
        stream.ensure(4)
        assert stream.blocks(0, 4)[0].tolist() == [1, 65_536, 200_000, 0]
    else:
        tokens = tokenize_once(source, sparse, domain="d", directory=tmp_path / "e").tokens
        assert tokens.tolist() == [1, 65_536, 200_000, 0]


def test_racing_processes_share_one_entry(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    both_writing = threading.Barrier(2, timeout=20)

    class Slow(Listed):
        def documents(self, domain: str) -> Iterator[str]:
            yield from self.lines
            both_writing.wait()

    caches = []

    def run() -> None:
        source = Slow.of(["one", "two", "three"])
        caches.append(tokenize_once(source, byte_tokenizer(), domain="d", directory=tmp_path / "e"))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = sorted(tokens_of(line) for line in ("one", "two", "three"))
    assert [sorted(documents_in(cache.tokens)) for cache in caches] == [expected, expected]
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    class Broken(Listed):
        def documents(self, domain: str) -> Iterator[str]:
            yield "one"
            raise ConfigError("no more")

    with pytest.raises(ConfigError, match="no more"):
        tokenize_once(Broken.of([]), tokenizer, domain="d", directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_domain_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"^data.domains.d is empty: none of its 2 documents holds any text\.$"):
        tokenize_once(Listed.of(["", " \n"]), tokenizer, domain="d", directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTPRUNE_CACHE", raising=False)
    assert cache_root(None) == Path.home() / ".cache/lightprune"
    monkeypatch.setenv("LIGHTPRUNE_CACHE", "/somewhere")
    assert cache_root(None) == Path("/somewhere")
    assert cache_root("~/here") == Path.home() / "here"
