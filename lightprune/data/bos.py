"""BOS at the head of every document and of every block, and where the blocks begin because of it."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightprune.errors import ConfigError


@dataclass(frozen=True)
class Bos:
    """The token that opens texts.

    Attributes:
        token: Its id.
        is_eos: Whether it is also the token that closes documents, as in OPT. Then one token between two documents
            does both.
    """

    token: int
    is_eos: bool = False


def bos_of(tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None) -> Bos | None:
    """The BOS token that documents and blocks must begin with; None for none.

    Args:
        tokenizer: With or without a BOS token.
        wanted: None follows the tokenizer's own rule: whether `tokenizer(text)` puts BOS first.

    Raises:
        ConfigError: `wanted` is True, and the tokenizer has no BOS token.
    """
    token = tokenizer.bos_token_id
    if wanted and token is None:
        raise ConfigError("data.bos is true, but the tokenizer has no BOS token: set data.bos to null or false.")
    if token is None or wanted is False or not (wanted or _puts_first(tokenizer, token)):
        return None
    return Bos(token, is_eos=token == tokenizer.eos_token_id)


def _puts_first(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return bool(with_special[:1] == [token] != without[:1])


@dataclass
class BlockStarts:
    """Where each block of `size` tokens begins in a row of tokens.

    Without BOS, block k begins at `start + k * size`. With BOS, a block that begins with a BOS of the text is read as
    it is. Any other block is given one, so it takes only `size - 1` tokens of the text. So no token is left out between
    two blocks, none is in two blocks, and where a block begins depends only on where the block before it begins. With
    w(k) = how many of the blocks before block k begin with a BOS of the text,

        block k begins at start + k * (size - 1) + w(k)

    Attributes:
        start: The token that the first block begins at.
        size: Tokens in a block.
        bos: None for none.
        whole: The blocks that begin with a BOS of the text, ascending.
    """

    start: int
    size: int
    bos: Bos | None = None
    whole: list[int] = field(default_factory=list)

    def extend(self, places: Iterable[int]) -> None:
        """Takes note of the next BOS tokens of the text.

        Args:
            places: Their positions, ascending, and all behind those noted before.
        """
        step = self.size - 1
        block = self.whole[-1] + 1 if self.whole else 0
        begins = self(block)
        for place in places:
            ahead = place - begins
            if ahead >= 0 and ahead % step == 0:
                block += ahead // step
                self.whole.append(block)
                block, begins = block + 1, place + self.size

    def __call__(self, block: int) -> int:
        """The position of the first token of the text in a block, if all BOS tokens in front of it are noted."""
        if self.bos is None:
            return self.start + block * self.size
        return self.start + block * (self.size - 1) + bisect_left(self.whole, block)

    def complete(self, tokens: int) -> int:
        """How many blocks the first `tokens` tokens of the text fill, if all BOS tokens among these are noted."""
        step = self.size if self.bos is None else self.size - 1
        most = max(0, tokens - self.start) // step
        return max(0, bisect_right(range(most + 1), tokens, key=self) - 1)

    def read(self, block: int, tokens: Callable[[int, int], NDArray[Any]]) -> NDArray[Any]:
        """[size], a block.

        Args:
            block: Its number.
            tokens: Reads tokens of the text: the position of the first one, and how many.
        """
        first = self(block)
        place = bisect_left(self.whole, block)
        if self.bos is None or self.whole[place : place + 1] == [block]:
            return tokens(first, self.size)
        return np.insert(tokens(first, self.size - 1), 0, self.bos.token)


def bos_places(ends: NDArray[np.int64], bos: Bos | None, *, first: int = 0) -> list[int]:
    """The positions of the BOS tokens that open documents.

    Args:
        ends: [documents], the position after each document.
        bos: None gives no positions.
        first: The position of the first document.
    """
    if bos is None:
        return []
    if bos.is_eos:  # a document's own EOS opens the next one
        return [end - 1 for end in ends.tolist()]
    return [first, *ends[:-1].tolist()] if len(ends) else []
