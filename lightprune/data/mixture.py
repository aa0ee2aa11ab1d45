"""A weighted mixture of domains: endless, sharded over ranks, resumed exactly, its weights free to change."""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from lightprune.data.order import BlockOrder, FixedSupply, Supply
from lightprune.errors import ConfigError, is_finite

_KEYS = {
    "domains": "data.domains",
    "seed": "data.seed",
    "global_batch": "data.batch_size x number of ranks",
    "weights_lag": "data.weights_lag",
}


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> None:
    """Refuses weights that are no mixture of exactly these domains.

    Raises:
        ConfigError: An unknown or a missing domain, a weight that is negative or not finite, or no weight above 0.
    """
    for name, weight in weights.items():
        if name not in domains:
            raise ConfigError(f"data.weights names {name!r}, but data.domains has only: {', '.join(domains)}.")
        if not is_finite(weight) or weight < 0:
            raise ConfigError(f"data.weights.{name} is {weight!r}, but must be 0 or a positive number.")
    for name in domains:
        if name not in weights:
            raise ConfigError(f"data.weights names no weight for {name!r}; write 0 to leave a domain out of training.")
    if not any(weights.values()):
        raise ConfigError("data.weights are all 0, but at least one domain must have a positive weight.")


@dataclass(frozen=True)
class _Position:
    """A place in the global sequence: how many samples came before it, in all and of each domain."""

    samples: int
    drawn: tuple[int, ...]


class MixtureSampler(DistributedSampler[tuple[int, int]]):
    """Draws a domain for every sample by weight, and that domain's next block. A sample is (domain, block).

    There is one global sequence of samples, the same on every rank; rank r takes the samples n with n mod R = r. With

        u_n = uniform number n of a counter-based generator (Philox) with the key `seed`
        d_n = the domain in which u_n falls, by the weights in force at sample n
        c   = how many of the samples before n were from d_n

    sample n is block c of the order of its domain (`BlockOrder`). So it is a pure function of the seed, the weights,
    and one cursor for each domain. That is all the state there is, and a domain repeats a block only when it has shown
    all of them.

    What counts as state is what training has *consumed* (see `MixtureLoader`). Batches that workers have prefetched
    beyond that are drawn again after a resume, and are the same. New weights act `weights_lag` batches behind what is
    consumed, however many workers there are, so the number of workers never changes what comes.

    Iteration never ends, and each new iterator goes on where consumption stands: an epoch is only a number of batches.

    It derives from `DistributedSampler` because that is what Lightning never replaces, whatever
    `Trainer(use_distributed_sampler=...)` says.

    Args:
        blocks: The training blocks of each domain, in the order of the data set: their number, or a stream of them.
        weights: A weight for each domain, of any sum.
        batch_size: Samples in the batch of one rank.
        num_replicas: Number of ranks, R.
        rank: This rank, r.
        seed: At least 0.
        weights_lag: After how many batches new weights act. Workers must not be further ahead of training than that.
    """

    def __init__(
        self,
        blocks: Mapping[str, int | Supply],
        *,
        weights: Mapping[str, float],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        weights_lag: int = 0,
    ) -> None:
        supplies = [FixedSupply(blocks) if isinstance(blocks, int) else blocks for blocks in blocks.values()]
        samples: Any = range(sum(supply.nominal for supply in supplies))
        super().__init__(samples, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        check_weights(weights, list(blocks))
        self.batch_size = batch_size
        self.weights_lag = weights_lag
        self._names = list(blocks)
        self._orders = [BlockOrder(supply, seed=seed, domain=index) for index, supply in enumerate(supplies)]
        self._consumed = _Position(0, (0,) * len(blocks))
        self._ahead: deque[_Position] = deque()
        # Pairs of a sample and the weights in force from it on; the first is in force where consumption stands.
        self._schedule: list[tuple[int, dict[str, float]]] = [(0, dict(weights))]

    @property
    def weights(self) -> dict[str, float]:
        """The weights that were set last, as they were given."""
        return dict(self._schedule[-1][1])

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the mixture from the first batch that no worker can have drawn yet: `weights_lag` batches from here.

        Before the first batch, it changes the mixture at once. All ranks must call it after the same batch.

        Raises:
            ConfigError: The weights do not fit the domains.
        """
        check_weights(weights, self._names)
        # Counted from what is consumed, not from what happens to be drawn: a resumed run has drawn something else.
        consumed = self._consumed.samples
        start = consumed + self.weights_lag * self._global_batch if consumed else 0
        self._schedule = [*(entry for entry in self._schedule if entry[0] < start), (start, dict(weights))]

    @property
    def samples_seen(self) -> dict[str, int]:
        """How many blocks of each domain training has consumed, on all ranks together."""
        return dict(zip(self._names, self._consumed.drawn, strict=True))

    @property
    def epochs_seen(self) -> dict[str, float]:
        """How often training has passed over each domain; 0 as long as the length of a stream is unknown."""
        counts = [order.supply.count for order in self._orders]
        drawn = zip(self._names, self._consumed.drawn, counts, strict=True)
        return {name: samples / count if count else 0.0 for name, samples, count in drawn}

    def advance(self) -> None:
        """Training has consumed one more batch."""
        self._consumed = self._ahead.popleft()
        in_force = max(i for i, (start, _) in enumerate(self._schedule) if start <= self._consumed.samples)
        del self._schedule[:in_force]

    def state_dict(self) -> dict[str, Any]:
        """Plain Python of constant size, the same on every rank."""
        return {
            **self._settings,
            "samples": self._consumed.samples,
            "drawn": list(self._consumed.drawn),
            "weights": [[start, dict(weights)] for start, weights in self._schedule],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last consumed batch, with the weights of the checkpoint.

        The number of ranks may be another one if they take batches of the same size together.

        Raises:
            ConfigError: It could not be exact: the checkpoint's run had other domains, blocks, another seed or lag,
                or batches of another size on all ranks together.
        """
        for setting, here in self._settings.items():
            there = state.get(setting)
            if there != here:
                raise ConfigError(
                    f"The checkpoint was written with {_KEYS[setting]} = {there}, but this run has {here}, so the next "
                    "batch would be another one: resume with the same data settings, or start a new run."
                )
        self._ahead.clear()
        self._consumed = _Position(state["samples"], tuple(state["drawn"]))
        self._schedule = [(start, dict(weights)) for start, weights in state["weights"]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self._ahead.clear()
        position = self._consumed
        while True:
            samples, position = self._draw(position)
            self._ahead.append(position)
            yield from samples[self.rank :: self.num_replicas]

    def ahead(self) -> "MixtureSampler":
        """A sampler that draws what this one will draw next. What it draws is not consumed."""
        ahead = copy.copy(self)
        ahead._ahead, ahead._schedule = deque(), list(self._schedule)
        return ahead

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.num_replicas

    @property
    def _settings(self) -> dict[str, Any]:
        """What the sequence of batches depends on, the weights aside."""
        # As a list: the order of the domains counts.
        identities = [order.supply.identity for order in self._orders]
        return {
            "domains": [list(pair) for pair in zip(self._names, identities, strict=True)],
            "seed": self.seed,
            "global_batch": self._global_batch,
            "weights_lag": self.weights_lag,
        }

    def _draw(self, position: _Position) -> tuple[list[tuple[int, int]], _Position]:
        """The samples of the next batch of all ranks together, and the place after it."""
        samples: list[tuple[int, int]] = []
        drawn = list(position.drawn)
        for domain in self._draw_domains(position.samples):
            samples.append((domain, self._orders[domain](drawn[domain])))
            drawn[domain] += 1
        return samples, _Position(position.samples + len(samples), tuple(drawn))

    def _draw_domains(self, first: int) -> list[int]:
        # One step of Philox' counter gives four numbers. Only the first is used, so that u_n depends on n alone and not
        # on how the samples were batched.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=first))
        uniform = generator.random(4 * self._global_batch)[::4]
        weights = next(weights for start, weights in reversed(self._schedule) if start <= first)
        cumulative = np.cumsum([weights[name] for name in self._names])
        drawn: list[int] = np.searchsorted(cumulative / cumulative[-1], uniform, side="right").tolist()
        return drawn
