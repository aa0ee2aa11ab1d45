"""The loader that tells its sampler which batches training has consumed."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightprune.data.blocks import BlockDataset
from lightprune.data.mixture import MixtureSampler


class MixtureLoader(DataLoader[dict[str, Tensor]]):
    """Loads batches of a `MixtureSampler` and tells it which of them were consumed.

    A batch is consumed when it is handed out: Lightning fetches none in advance from a loader that has a length.
    `len()` is the length of an epoch, but iteration does not end: stop it as Lightning does.

    Args:
        dataset: The training blocks.
        sampler: The mixture; its `batch_size` is the loader's, and its `weights_lag` is how far workers run ahead.
        num_workers: Worker processes, at most `weights_lag`.
        **kwargs: Anything else that `DataLoader` takes, but `prefetch_factor`.
    """

    sampler: MixtureSampler

    def __init__(self, dataset: BlockDataset, sampler: MixtureSampler, *, num_workers: int = 0, **kwargs: Any) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=sampler.batch_size,
            drop_last=True,
            num_workers=num_workers,
            prefetch_factor=sampler.weights_lag // num_workers if num_workers else None,
            **kwargs,
        )

    # A generator: nothing is drawn before the first batch is asked for. Lightning may make the iterator before it has
    # restored the state (`estimated_stepping_batches` in `configure_optimizers` makes it do so).
    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            self.sampler.advance()
            yield batch

    def upcoming(self) -> Iterator[dict[str, Tensor]]:
        """The batches that training will get next, read without consuming them."""
        yield from DataLoader(
            self.dataset,
            sampler=self.sampler.ahead(),
            batch_size=self.batch_size,
            drop_last=True,
            generator=self.generator,
        )

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state. With these two methods Lightning knows that the loader can be resumed."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the sampler's state."""
        self.sampler.load_state_dict(state)
