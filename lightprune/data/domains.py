"""Opens domains: tokenizes what is not in the cache, and cuts each domain into blocks for training and validation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightprune.data.blocks import Blocks, StreamedBlocks, fingerprint, split_blocks
from lightprune.data.bos import Bos
from lightprune.data.order import FixedSupply, Supply
from lightprune.data.readers import key_of
from lightprune.data.sources import Source
from lightprune.data.stream import WINDOW, BlockStream, TokenStream
from lightprune.data.tokens import TokenCache, cache_entry, tokenize_once, tokenizer_identity
from lightprune.errors import ConfigError


@dataclass(frozen=True)
class Domain:
    """A domain that can be trained and validated on.

    Attributes:
        train: The training blocks, to read.
        supply: How many of them there are, as far as that is known.
        validation: The held-out blocks, to read.
        held_out: How many of them there are.
    """

    train: Blocks | StreamedBlocks
    supply: Supply
    validation: Blocks | StreamedBlocks
    held_out: int


def tokenize_domains(
    sources: Mapping[str, Source], tokenizer: PreTrainedTokenizerBase, *, cache: Path, bos: Bos | None = None
) -> dict[str, TokenCache | TokenStream]:
    """The tokens of each domain; those of a stream are still to come.

    Args:
        sources: The source of each domain.
        tokenizer: Must have an EOS token.
        cache: The root of the cache.
        bos: What every document begins with; None for whatever the text has there.

    Raises:
        ConfigError: A source cannot be read, or holds no text; there can be no cache at `cache`.
    """
    identity = tokenizer_identity(tokenizer, bos)
    # All entries first, so that a missing file is found before anything is made.
    entries = {name: cache_entry(cache, source, identity, domain=name) for name, source in sources.items()}
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The cache of tokens {str(cache)!r} cannot be made ({error.strerror}): set data.cache_dir, or "
            "LIGHTPRUNE_CACHE in the environment, to a directory that one may write to."
        ) from error
    return {
        name: (TokenStream if sources[name].streaming else tokenize_once)(
            sources[name], tokenizer, domain=name, directory=directory, bos=bos
        )
        for name, directory in entries.items()
    }


def open_domain(
    tokens: TokenCache | TokenStream,
    *,
    name: str,
    block_size: int,
    validation: int | float,
    max_blocks: int | None,
    bos: Bos | None = None,
) -> Domain:
    """Cuts a domain into blocks, and says in the log how many there are.

    Args:
        tokens: From `tokenize_domains`.
        name: The domain's.
        block_size: Tokens in a block.
        validation: Held out at least: a share of the blocks (float, not for a stream), or a number of blocks (int).
        max_blocks: At most that many training blocks; None for all.
        bos: What every block begins with: the same as in `tokenize_domains`.

    Raises:
        ConfigError: The text does not fill one block for training and one for validation, or `validation` asks for
            all of it; a source cannot be read.
    """
    if isinstance(tokens, TokenStream):
        return _open_stream(tokens, name=name, block_size=block_size, wanted=int(validation), max_blocks=max_blocks)
    whole = split_blocks(tokens, block_size=block_size, validation=validation, domain=name, bos=bos)
    split = whole.limited(max_blocks)
    capped = f" (max_blocks, of {whole.train.count:,})" if split is not whole else ""
    blank = f", {tokens.blank:,} blank ones left out" if tokens.blank else ""
    rank_zero_info(
        f"Domain {name!r}: {len(tokens.tokens):,} tokens in {len(tokens.ends):,} documents{blank}; "
        f"{split.train.count:,} training{capped} and {split.validation.count:,} validation blocks of "
        f"{block_size}{_opened(bos)}, split {'between' if split.by_document else 'inside'} documents; "
        f"{split.dropped:,} tokens in the tails dropped."
    )
    return Domain(
        split.train, FixedSupply(split.train.count, split.train.fingerprint), split.validation, split.validation.count
    )


def _open_stream(tokens: TokenStream, *, name: str, block_size: int, wanted: int, max_blocks: int | None) -> Domain:
    """Holds out the first `wanted` blocks, up to the end of the document if that is at most twice as much."""
    enough = (2 * wanted + 1) * block_size
    there = min(tokens.ensure(enough), enough)
    validation = tokens.blocks(0, block_size)
    if validation.complete(there) <= wanted:
        raise ConfigError(
            f"{key_of(name)} has {there} tokens, fewer than the {wanted} blocks of {block_size} "
            "that data.validation asks for and one to train on: give it more text, or lower data.validation or "
            "data.block_size."
        )
    head = validation.tokens(0, there)
    least, most = validation.begin(wanted), min(validation.begin(2 * wanted), there - block_size)
    ends = np.flatnonzero(head == tokens.eos) + 1
    fitting = ends[(ends >= least) & (ends <= most)]
    start = int(fitting[0]) if len(fitting) else least
    held_out = validation.complete(start)
    train = BlockStream(tokens, start, block_size, max_blocks, WINDOW, fingerprint(head))
    rank_zero_info(
        f"Domain {name!r}: a stream, its first {held_out:,} blocks of {block_size}{_opened(tokens.bos)} for "
        f"validation, split {'between' if len(fitting) else 'inside'} documents; {tokens.progress.tokens:,} tokens in "
        f"the cache so far; shuffled in windows of {WINDOW:,} blocks."
    )
    return Domain(train.blocks, train, validation, held_out)


def _opened(bos: Bos | None) -> str:
    return "" if bos is None else f" that open with BOS ({bos.token})"
