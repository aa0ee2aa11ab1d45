"""BOS where the tokenizer puts it: first in every document and in every block, and nowhere twice."""

import hashlib
import itertools
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerBase

from lightprune.data import Source, TextDataModule
from lightprune.data.blocks import Blocks, split_blocks
from lightprune.data.bos import Bos, bos_of
from lightprune.data.stream import BlockStream, TokenStream
from lightprune.data.tokens import TokenCache, tokenize_once, tokenizer_identity
from lightprune.errors import ConfigError
from lightprune.metrics import IGNORE_INDEX
from tests.data.conftest import BOS, EOS, byte_tokenizer, rows_of

SIZE = 7
TEXTS = [f"d{i:03d}" + "x" * (i * 5 % 17) for i in range(300)]
OPENED = Bos(BOS)
SHARED = Bos(EOS, is_eos=True)


def blocks_by_hand(tokens: list[int], opening: int | None, size: int = SIZE) -> list[list[int]]:
    """A plain loop over a row of tokens."""
    blocks: list[list[int]] = []
    block: list[int] = []
    for token in tokens:
        if not block and opening is not None and token != opening:
            block.append(opening)
        block.append(token)
        if len(block) == size:
            blocks.append(block)
            block = []
    return blocks


def text_in(blocks: list[list[int]]) -> list[int]:
    """The tokens of blocks, without any BOS."""
    return [token for block in blocks for token in block if token != BOS]


def gemma(folder: Path) -> PreTrainedTokenizerBase:
    """Gemma's own class, with a vocabulary of two letters, from a directory."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "a", "▁", "b"])}
    GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("tokenizer", "wanted", "expected"),
    [
        (byte_tokenizer(), None, None),
        (byte_tokenizer(bos="<bos>"), None, OPENED),
        (byte_tokenizer(bos="<bos>"), True, OPENED),
        (byte_tokenizer(bos="<bos>"), False, None),
        (byte_tokenizer(bos="<bos>", puts_bos=False), None, None),
        (byte_tokenizer(bos="<bos>", puts_bos=False), True, OPENED),
        (byte_tokenizer(bos="<eos>"), None, SHARED),
        (byte_tokenizer(bos="<eos>", puts_bos=False), None, None),
    ],
)
def test_the_tokenizers_own_rule_and_the_setting(
    tokenizer: PreTrainedTokenizerBase, wanted: bool | None, expected: Bos | None
) -> None:
    assert bos_of(tokenizer, wanted) == expected


def test_gemmas_rule(tmp_path: Path) -> None:
    assert bos_of(gemma(tmp_path)) == Bos(2)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.bos is true, but the tokenizer has no BOS token: set data.bos to"):
        data(tmp_path, byte_tokenizer(), bos=True).setup("fit")
    with pytest.raises(ConfigError, match=re.escape("data.bos is 'yes': it must be true, false, or null")):
        data(tmp_path, byte_tokenizer(), bos="yes")


def data(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextDataModule:
    path = folder / "text.jsonl"
    if not path.exists():
        path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    source = Source(files=str(path), streaming=options.pop("streaming", False))
    defaults = {
        "domains": {"d": source},
        "weights": {"d": 1},
        "block_size": SIZE,
        "batch_size": 1,
        "validation": 5,
        "num_workers": 0,
        "cache_dir": str(folder / "cache"),
    }
    module = TextDataModule(tokenizer=tokenizer, **(defaults | options))
    return module


def epoch(module: TextDataModule) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """One pass over the training blocks, their labels, and the validation blocks."""
    module.setup("fit")
    held_out = [row for batch in module.val_dataloader() for row in batch["input_ids"].tolist()]
    batches = iter(module.train_dataloader())
    train, labels = [], []
    while not train or module.epochs_seen["d"] < 1:
        batch = next(batches)
        train += batch["input_ids"].tolist()
        labels += batch["labels"].tolist()
    return train, labels, held_out


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_block_and_every_document_opens_with_bos_and_no_token_is_lost(
    tmp_path: Path, streaming: bool, num_workers: int
) -> None:
    tokenizer = byte_tokenizer(bos="<bos>")
    module = data(tmp_path, tokenizer, streaming=streaming, num_workers=num_workers)
    train, labels, held_out = epoch(module)
    assert all(len(block) == SIZE and block[0] == BOS for block in train + held_out)
    assert not any(left == right == BOS for block in train + held_out for left, right in itertools.pairwise(block))
    # Every document as the tokenizer itself makes it, closed by EOS.
    documents = [[*tokenizer(text)["input_ids"], EOS] for text in TEXTS]
    assert documents[0][0] == BOS
    flat = [token for block in sorted(train) for token in block]
    assert not any(left == EOS != BOS != right for left, right in itertools.pairwise(flat))
    assert len(text_in(train)) + len(text_in(held_out)) > sum(len(d) - 1 for d in documents) - 2 * SIZE
    if streaming:
        row = [token for document in documents for token in document]
        start = next(i for i in range(len(row)) if len(blocks_by_hand(row[:i], BOS)) == 5 and row[i] == BOS)
        assert held_out == blocks_by_hand(row[:start], BOS)
        assert sorted(train) == sorted(blocks_by_hand(row[start:], BOS))
    # BOS is given, and not predicted; all else is.
    expected = [[IGNORE_INDEX if token == BOS else token for token in block] for block in train]
    assert labels == expected
    assert module.tokens_seen == {"d": len(train) * SIZE}


@pytest.mark.parametrize("streaming", [False, True])
def test_switched_off_the_blocks_and_the_cache_are_those_of_a_tokenizer_without_bos(
    tmp_path: Path, streaming: bool
) -> None:
    off = epoch(data(tmp_path, byte_tokenizer(bos="<bos>"), bos=False, streaming=streaming))
    without = epoch(data(tmp_path, byte_tokenizer(), streaming=streaming))
    assert off == without
    assert off[0] == off[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_where_bos_is_eos_one_stands_between_two_documents(tmp_path: Path, streaming: bool) -> None:
    train, labels, held_out = epoch(data(tmp_path, byte_tokenizer(bos="<eos>"), streaming=streaming))
    assert all(block[0] == EOS for block in train + held_out)
    assert not any(left == right == EOS for block in train + held_out for left, right in itertools.pairwise(block))
    assert labels == train, "a model has to predict where a document ends"


def test_a_bos_that_is_written_out_in_the_text_is_not_doubled(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"<bos>chat{i}"}) for i in range(20)))
    train, _, held_out = epoch(data(tmp_path, byte_tokenizer(bos="<bos>"), validation=1))
    assert ord("<") not in text_in(train)
    assert not any(left == right == BOS for block in train + held_out for left, right in itertools.pairwise(block))


def cache_of(folder: Path, sizes: list[int], bos: Bos | None) -> TokenCache:
    """Documents of the given sizes; the token at position n is n + 1000, but for what opens and closes documents."""
    ends = np.cumsum(sizes)
    tokens = np.arange(1000, 1000 + sum(sizes))
    tokens[ends - 1] = EOS
    if bos is not None and not bos.is_eos:
        tokens[[0, *ends[:-1]]] = bos.token
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    np.save(folder / "ends.npy", ends)
    return TokenCache(folder, blank=0)


@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=30),
    block_size=st.integers(2, 16),
    wanted=st.integers(1, 20),
    bos=st.sampled_from([None, OPENED, SHARED]),
)
def test_splits_equal_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_size: int, wanted: int, bos: Bos | None
) -> None:
    cache = cache_of(tmp_path_factory.mktemp("cache"), sizes, bos)
    opening, row = bos and bos.token, cache.tokens.tolist()
    if len(blocks_by_hand(row, opening, block_size)) < max(2, wanted + 1):
        return
    split = split_blocks(cache, block_size=block_size, validation=wanted, domain="d", bos=bos)
    start = split.validation.start
    assert rows_of(split.train) == blocks_by_hand(row[:start], opening, block_size)
    assert rows_of(split.validation) == blocks_by_hand(row[start:], opening, block_size)
    assert split.train.count >= 1
    assert wanted <= split.validation.count <= 2 * wanted
    boundaries = [0, *np.cumsum(sizes)[:-1].tolist()]
    if split.by_document:
        later = [b for b in boundaries if b > start]
        assert not any(len(blocks_by_hand(row[b:], opening, block_size)) >= wanted for b in later)
        assert start in boundaries
    else:
        assert split.validation.count == wanted
    ends = [split.train.end, split.validation.end]
    assert split.dropped == start - ends[0] + len(row) - ends[1] < 2 * block_size
    copy = pickle.loads(pickle.dumps(split.train))
    assert rows_of(copy) == rows_of(split.train)
    assert copy == split.train


def test_what_was_cached_without_bos_is_used_by_no_tokenizer_that_puts_it() -> None:
    for tokenizer, bos in ((byte_tokenizer(bos="<bos>"), OPENED), (byte_tokenizer(bos="<eos>"), SHARED)):
        assert tokenizer_identity(tokenizer, bos) != tokenizer_identity(tokenizer)


def test_what_was_cached_by_earlier_releases_for_other_tokenizers_stays_valid() -> None:
    tokenizer = byte_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["truncation"], rules["padding"]
    earlier = hashlib.sha256(json.dumps([rules, EOS], sort_keys=True).encode()).hexdigest()
    assert tokenizer_identity(tokenizer, bos_of(tokenizer)) == earlier


def test_a_checkpoint_of_a_run_without_bos_is_not_gone_on_from_with_it(tmp_path: Path) -> None:
    for streaming in (False, True):
        for bos in ("<bos>", "<eos>"):
            older, newer = (
                data(tmp_path, byte_tokenizer(bos=bos), bos=on, streaming=streaming) for on in (False, None)
            )
            older.setup("fit")
            newer.setup("fit")
            with pytest.raises(ConfigError, match="resume with the same data settings"):
                newer.load_state_dict(older.state_dict())


def stream(folder: Path, texts: list[str] = TEXTS) -> TokenStream:
    path = folder / "stream.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = Source(files=str(path), streaming=True)
    return TokenStream(source, byte_tokenizer(bos="<bos>"), domain="d", directory=folder / "cache", bos=OPENED)


def test_a_stream_that_grows_has_the_blocks_of_the_whole(tmp_path: Path) -> None:
    """Read by one that looks again and again, by one that comes later, and by one in a worker."""
    row = [token for text in TEXTS for token in [BOS, *text.encode(), EOS]]
    start = 40
    expected = blocks_by_hand(row[start:], BOS)
    watching: BlockStream | None = None
    for wanted in (1, 2, 50, 51, 400, 10**6):
        tokens = stream(tmp_path)  # a process that goes on where another one has stopped
        tokens.ensure(start)
        fresh = BlockStream(tokens, start, SIZE, None, 16)
        there = fresh.ensure(wanted)
        assert there == min(wanted, len(expected))
        watching = watching or BlockStream(stream(tmp_path), start, SIZE, None, 16)
        for reader in (fresh.blocks, watching.blocks, pickle.loads(pickle.dumps(watching.blocks))):
            assert [reader[block].tolist() for block in range(there)] == expected[:there]
            assert reader[there - 1].tolist() == expected[there - 1]
    assert fresh.count == len(expected)
    assert fresh.tokens.progress.filled == len(TEXTS)


def test_what_a_killed_writer_has_left_behind_is_written_over(tmp_path: Path) -> None:
    first = stream(tmp_path)
    first.ensure(300)
    first._thread.shutdown(wait=True)
    for name in ("tokens.bin", "ends.bin"):
        with (tmp_path / "cache" / name).open("ab") as file:
            file.write(os.urandom(13))
    again = stream(tmp_path)
    again.ensure(10**9)
    row = [token for text in TEXTS for token in [BOS, *text.encode(), EOS]]
    blocks = again.blocks(0, SIZE)
    assert blocks.complete(len(row)) == len(blocks_by_hand(row, BOS))
    assert [blocks[n].tolist() for n in range(blocks.complete(len(row)))] == blocks_by_hand(row, BOS)


def test_workers_get_where_blocks_begin_and_not_the_tokens(tmp_path: Path) -> None:
    tokens = tokenize_once(
        Source(files=str(write(tmp_path, "a" * 100_000)), separator="|"),
        byte_tokenizer(bos="<bos>"),
        domain="d",
        directory=tmp_path / "entry",
        bos=OPENED,
    )
    split = split_blocks(tokens, block_size=10, validation=5, domain="d", bos=OPENED)
    assert isinstance(split.train, Blocks)
    assert int(split.train[5][0]) == BOS
    assert len(pickle.dumps(split.train)) < 1000


def write(folder: Path, text: str) -> Path:
    path = folder / "long.txt"
    path.write_text(text)
    return path


def test_a_model_of_gemma_sees_what_its_tokenizer_makes_of_each_document(tmp_path: Path) -> None:
    tokenizer = gemma(tmp_path / "gemma")
    texts = ["ab" * (2 + n % 5) for n in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    module = data(tmp_path, tokenizer, block_size=64, validation=1)
    module.setup("fit")
    (batch,) = list(module.val_dataloader())
    held_out = batch["input_ids"][0]
    opened = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts}
    documents = np.split(held_out.numpy(), np.flatnonzero(held_out.numpy() == tokenizer.bos_token_id)[1:])
    assert {tuple(document.tolist()) for document in documents[:-1]} <= opened
    assert len(documents) > 5
    assert torch.equal(batch["labels"] == IGNORE_INDEX, batch["input_ids"] == tokenizer.bos_token_id)
