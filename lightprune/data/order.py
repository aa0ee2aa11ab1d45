"""The order in which a domain shows its blocks: a permutation for each pass, or for each window of a stream."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Supply(Protocol):
    """The training blocks that a domain has, as far as that is known."""

    @property
    def count(self) -> int | None:
        """How many there are; None as long as a stream has not ended."""

    @property
    def nominal(self) -> int:
        """What the domain counts for in the length of an epoch, in blocks; known at the start."""

    @property
    def window(self) -> int:
        """How many neighboring blocks are shuffled together."""

    @property
    def identity(self) -> object:
        """Plain Python that differs where the blocks differ, to recognize a checkpoint of other data."""

    def ensure(self, count: int) -> int:
        """Waits until the first `count` blocks can be read, and returns how many of these there are."""


@dataclass(frozen=True)
class FixedSupply:
    """A domain whose blocks are all there: one window.

    Attributes:
        count: How many there are.
        text: What tells them from other blocks.
    """

    count: int
    text: str = ""

    @property
    def nominal(self) -> int:
        return self.count

    @property
    def window(self) -> int:
        return self.count

    @property
    def identity(self) -> dict[str, object]:
        return {"blocks": self.count, "text": self.text}

    def ensure(self, count: int) -> int:
        return min(count, self.count)


class BlockOrder:
    """Block number `cursor` of the endless sequence of one domain's blocks, for any cursor.

    With N blocks in windows of K (N = K unless the domain streams),

        e, p = cursor div N, cursor mod N      pass over the domain, and the place in it
        w, k = p div K, p mod K                window of the pass, and the place in it

    the block is w·K + π(k), where π is a permutation, seeded by (seed, domain, e, w), of as many blocks as the window
    holds. As long as a stream has not ended, e = 0.

    Args:
        supply: The domain's blocks.
        seed: Of the run.
        domain: The domain's index.
    """

    def __init__(self, supply: Supply, *, seed: int, domain: int) -> None:
        self.supply = supply
        self._key = seed, domain
        self._window: tuple[int, int] | None = None
        self._blocks: NDArray[np.int64]

    def __call__(self, cursor: int) -> int:
        count, size = self.supply.count, self.supply.window
        epoch, place = divmod(cursor, count) if count else (0, cursor)
        window, offset = divmod(place, size)
        if (epoch, window) != self._window:
            first = window * size
            here = self.supply.ensure(first + size) - first
            if here <= offset:  # the stream has ended in front of this place: now its count is known
                return self(cursor)
            self._blocks = first + np.random.default_rng([*self._key, epoch, window]).permutation(here)
            self._window = epoch, window
        return int(self._blocks[offset])
