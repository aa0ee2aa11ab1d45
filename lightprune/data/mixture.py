"""A weighted mixture of domains: endless, sharded over ranks, resumed exactly, its weights free to change."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightprune.data.blocks import BlockDataset
from lightprune.errors import ConfigError


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> None:
    """Refuses weights that are no mixture of exactly these domains.

    Raises:
        ConfigError: An unknown or a missing domain, a weight that is negative or not finite, or no weight above 0.
    """
    for name, weight in weights.items():
        if name not in domains:
            raise ConfigError(f"data.weights names {name!r}, but data.domains has only: {', '.join(domains)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"data.weights.{name} is {weight}, but must be 0 or a positive number.")
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


class MixtureSampler(DistributedSampler[int]):
    """Draws a domain for every sample by weight, and that domain's next block.

    There is one global sequence of samples, the same on every rank; rank r takes the samples n with n mod R = r. With

        u_n = uniform number n of a counter-based generator (Philox) with the key `seed`
        d_n = the domain in which u_n falls, by the weights in force at sample n
        c   = how many of the samples before n were from d_n

    sample n is block π(c mod N) of its domain, where π is a permutation of the domain's N blocks seeded by (seed,
    domain, c div N). So it is a pure function of the seed, the weights, and one cursor for each domain. That is all the
    state there is, and a domain repeats a block only when it has shown all of them.

    What counts as state is what training has *consumed* (see `MixtureLoader`). Batches that workers have prefetched
    beyond that are drawn again after a resume, and are the same.

    Iteration never ends, and each new iterator goes on where consumption stands: an epoch is only a number of batches.

    It derives from `DistributedSampler` because that is what Lightning never replaces, whatever
    `Trainer(use_distributed_sampler=...)` says.

    Args:
        blocks: The number of training blocks of each domain, in the order of the data set.
        weights: A weight for each domain, of any sum.
        batch_size: Samples in the batch of one rank.
        num_replicas: Number of ranks, R.
        rank: This rank, r.
        seed: At least 0.
        lead: How many batches the workers are ahead of training: `num_workers * prefetch_factor`.
    """

    def __init__(
        self,
        blocks: Mapping[str, int],
        *,
        weights: Mapping[str, float],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        lead: int = 0,
    ) -> None:
        samples: Any = range(sum(blocks.values()))
        super().__init__(samples, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        check_weights(weights, list(blocks))
        self.blocks = dict(blocks)
        self.batch_size = batch_size
        self.lead = lead
        self._names = list(blocks)
        self._sizes = list(blocks.values())
        self._offsets = np.cumsum([0, *self._sizes]).tolist()
        self._permutations: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._consumed = _Position(0, (0,) * len(blocks))
        self._ahead: deque[_Position] = deque()
        # Pairs of a sample and the weights in force from it on; the first is in force where consumption stands.
        self._schedule: list[tuple[int, dict[str, float]]] = [(0, dict(weights))]

    @property
    def weights(self) -> dict[str, float]:
        """The weights that were set last, as they were given."""
        return dict(self._schedule[-1][1])

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the mixture from the first batch that no worker can have drawn yet: `lead` batches from here.

        Before the first batch, it changes the mixture at once. All ranks must call it after the same batch.

        Raises:
            ConfigError: The weights do not fit the domains.
        """
        check_weights(weights, self._names)
        # Counted from what is consumed, not from what happens to be drawn: a resumed run has drawn something else.
        consumed = self._consumed.samples
        start = consumed + self.lead * self._global_batch if consumed else 0
        self._schedule = [*(entry for entry in self._schedule if entry[0] < start), (start, dict(weights))]

    def advance(self) -> None:
        """Training has consumed one more batch."""
        self._consumed = self._ahead.popleft()
        in_force = max(i for i, (start, _) in enumerate(self._schedule) if start <= self._consumed.samples)
        del self._schedule[:in_force]

    def state_dict(self) -> dict[str, Any]:
        """Plain Python of constant size, the same on every rank."""
        return {
            "seed": self.seed,
            "blocks": dict(self.blocks),
            "samples": self._consumed.samples,
            "drawn": list(self._consumed.drawn),
            "weights": [[start, dict(weights)] for start, weights in self._schedule],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last consumed batch, with the weights of the checkpoint.

        Raises:
            ConfigError: The checkpoint's run had other domains, other blocks or another seed.
        """
        # As lists: the order of the domains counts.
        blocks = list(state["blocks"].items()), list(self.blocks.items())
        for key, (there, here) in {"domains": blocks, "seed": (state["seed"], self.seed)}.items():
            if there != here:
                raise ConfigError(
                    f"The checkpoint was written with data.{key} = {there}, but this run has {here}: resume with the "
                    "same data and block size, or start a new run."
                )
        self._ahead.clear()
        self._consumed = _Position(state["samples"], tuple(state["drawn"]))
        self._schedule = [(start, dict(weights)) for start, weights in state["weights"]]

    def __iter__(self) -> Iterator[int]:
        self._ahead.clear()
        position = self._consumed
        while True:
            samples, position = self._draw(position)
            self._ahead.append(position)
            yield from samples[self.rank :: self.num_replicas]

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.num_replicas

    def _draw(self, position: _Position) -> tuple[list[int], _Position]:
        """The data set's indices of the next batch of all ranks together, and the place after it."""
        samples: list[int] = []
        drawn = list(position.drawn)
        for domain in self._draw_domains(position.samples):
            epoch, place = divmod(drawn[domain], self._sizes[domain])
            samples.append(self._offsets[domain] + int(self._permutation(domain, epoch)[place]))
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

    def _permutation(self, domain: int, epoch: int) -> NDArray[np.int64]:
        cached = self._permutations.get(domain)
        if cached is None or cached[0] != epoch:
            generator = np.random.default_rng([self.seed, domain, epoch])
            cached = self._permutations[domain] = (epoch, generator.permutation(self._sizes[domain]))
        return cached[1]


class MixtureLoader(DataLoader[dict[str, Tensor]]):
    """Loads batches of a `MixtureSampler` and tells it which of them were consumed.

    A batch is consumed when it is handed out: Lightning fetches none in advance from a loader that has a length.
    `len()` is the length of an epoch, but iteration does not end: stop it as Lightning does.

    Args:
        dataset: The training blocks.
        sampler: The mixture; its `batch_size` is the loader's.
        **kwargs: Anything else that `DataLoader` takes.
    """

    sampler: MixtureSampler

    def __init__(self, dataset: BlockDataset, sampler: MixtureSampler, **kwargs: Any) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=sampler.batch_size, drop_last=True, **kwargs)

    # A generator: nothing is drawn before the first batch is asked for. Lightning may make the iterator before it has
    # restored the state (`estimated_stepping_batches` in `configure_optimizers` makes it do so).
    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state. With these two methods Lightning knows that the loader can be resumed."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the sampler's state."""
        self.sampler.load_state_dict(state)
