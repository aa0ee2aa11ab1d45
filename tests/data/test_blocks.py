import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightprune.data.blocks import PADDING, BlockDataset, Blocks, OrderedSampler, split_blocks, split_point
from lightprune.data.tokens import TokenCache
from lightprune.errors import ConfigError
from tests.data.conftest import rows_of


def cache_of(directory: Path, sizes: list[int]) -> TokenCache:
    """Documents of the given sizes; the token at position n is n."""
    np.save(directory / "tokens.npy", np.arange(sum(sizes), dtype=np.uint16))
    np.save(directory / "ends.npy", np.cumsum(sizes))
    return TokenCache(directory, blank=0)


def pack(tokens: list[int], size: int) -> list[list[int]]:
    """Packing as a plain loop."""
    blocks: list[list[int]] = []
    block: list[int] = []
    for token in tokens:
        block.append(token)
        if len(block) == size:
            blocks.append(block)
            block = []
    return blocks


def test_blocks_equal_a_plain_loop(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [5, 9, 3, 8, 6, 7, 4])  # 42 tokens; documents start at 0 5 14 17 25 31 38
    split = split_blocks(cache, block_size=4, validation=2, domain="d")
    assert split.by_document  # 34 would be 8 tokens from the end; the last boundary before it is 31
    assert rows_of(split.train) == pack(list(range(31)), 4)
    assert rows_of(split.validation) == pack(list(range(31, 42)), 4)
    assert split.dropped == 31 % 4 + 11 % 4


def test_long_documents_are_split_inside(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [103])
    split = split_blocks(cache, block_size=10, validation=0.25, domain="d")  # round(0.25 * 10) = 2 blocks
    assert not split.by_document
    assert rows_of(split.train) == pack(list(range(80)), 10)
    assert rows_of(split.validation) == pack(list(range(80, 103)), 10)
    assert split.dropped == 3


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    block_size=st.integers(2, 16),
    share=st.floats(0.01, 0.6),
)
def test_no_overlap_and_nothing_lost(sizes: list[int], block_size: int, share: float) -> None:
    blocks = sum(sizes) // block_size
    wanted = max(1, round(share * blocks))
    if wanted >= blocks:
        return
    ends = np.cumsum(sizes)
    start, by_document = split_point(ends, block_size=block_size, validation_blocks=wanted)
    train, held_out = start // block_size, (sum(sizes) - start) // block_size
    assert train >= 1
    assert wanted <= held_out <= 2 * wanted
    assert sum(sizes) - (train + held_out) * block_size < 2 * block_size
    boundaries = {0, *ends.tolist()}
    if by_document:
        assert start in boundaries
        assert not any(start < b <= sum(sizes) - wanted * block_size for b in boundaries), "a later one would do"
    else:
        assert held_out == wanted
        assert sum(sizes) - (train + held_out) * block_size < block_size


def test_a_limit_takes_training_blocks_only(tmp_path: Path) -> None:
    split = split_blocks(cache_of(tmp_path, [50, 50]), block_size=10, validation=3, domain="d")
    limited = split.limited(2)
    assert rows_of(limited.train) == pack(list(range(20)), 10)
    assert limited.validation == split.validation
    assert split.limited(None) is split.limited(1000) is split


def test_text_too_short_is_refused(tmp_path: Path) -> None:
    sentence = r"^data.domains.d has 19 tokens, fewer than two blocks of 10 .* lower data.block_size\.$"
    with pytest.raises(ConfigError, match=sentence):
        split_blocks(cache_of(tmp_path, [10, 9]), block_size=10, validation=0.1, domain="d")
    sentence = r"^data.validation is 2, which holds out all 2 blocks of data.domains.d: lower it\.$"
    with pytest.raises(ConfigError, match=sentence):
        split_blocks(cache_of(tmp_path, [10, 10]), block_size=10, validation=2, domain="d")


def test_samples_of_several_domains(tmp_path: Path) -> None:
    cache_of(tmp_path, [100])
    path = tmp_path / "tokens.npy"
    dataset = BlockDataset([Blocks(path, 3, 2, 4), Blocks(path, 20, 3, 4)])
    samples = [(0, 0), (0, 1), (1, 0), (1, 2)]
    assert [dataset[sample]["input_ids"].tolist() for sample in samples] == [
        [3, 4, 5, 6],
        [7, 8, 9, 10],
        [20, 21, 22, 23],
        [28, 29, 30, 31],
    ]
    assert [int(dataset[sample]["domain"]) for sample in samples] == [0, 0, 1, 1]
    sample = dataset[0, 1]
    assert {key: value.dtype for key, value in sample.items()} == dict.fromkeys(sample, torch.int64)
    assert sample["labels"].tolist() == sample["input_ids"].tolist()
    assert sample["attention_mask"].tolist() == [1] * 4
    assert dataset[0, PADDING]["labels"].tolist() == [-100] * 4


def test_workers_get_no_copy_of_the_tokens(tmp_path: Path) -> None:
    blocks = Blocks(cache_of(tmp_path, [60_000]).directory / "tokens.npy", 0, 6000, 10)
    assert int(blocks[5][0]) == 50
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[5].tolist() == list(range(50, 60))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_shows_every_block_once(ranks: int) -> None:
    seen = [list(OrderedSampler([3, 4], num_replicas=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(samples) for samples in seen}) == 1
    everything = [sample for group in zip(*seen, strict=True) for sample in group]
    blocks = [sample for sample in everything if sample != (0, PADDING)]
    assert blocks == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert everything[: -7 % ranks] == [(0, PADDING)] * (-7 % ranks)
