"""The losses of each domain, in training and in validation, of any module whose batches carry labels and a domain.

Shapes: B samples, T tokens, V vocabulary, D domains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lightprune.errors import ConfigError
from lightprune.integrations.exact_metric import widest
from lightprune.masks.forward_passes import logits_of
from lightprune.metrics import IGNORE_INDEX, places_of, token_losses

EMA = 0.1
"""What the newest step's loss weighs in the running mean (DRPruning, arXiv 2411.14055)."""


@dataclass(frozen=True)
class DomainBatch:
    """What this package reads of a batch.

    Attributes:
        labels: [B, T], not shifted; -100 is ignored.
        domain: [B], the index of each sample's domain.
    """

    labels: Tensor
    domain: Tensor

    @classmethod
    def of(cls, batch: Any, domains: int) -> "DomainBatch":
        """The same of a batch of any kind, where there are so many domains.

        Raises:
            ConfigError: it carries no labels or no domain.
        """
        for key, ndim in (("labels", 2), ("domain", 1)):
            value = batch.get(key) if isinstance(batch, Mapping) else None
            if not isinstance(value, Tensor) or value.ndim != ndim or value.is_floating_point():
                shape = "[B, T]" if ndim == 2 else "[B]"
                raise ConfigError(
                    f"DomainReweighting got a batch without `{key}`, an integer tensor {shape}: a batch must be a "
                    "mapping with `labels` [B, T] and `domain` [B], each sample's index in the data module's "
                    "`domain_names`; put it into what the data module's loaders yield."
                )
        found = batch["domain"]
        # Elsewhere this would wait for the device: `TrainingLosses` and `DomainLoss` count such samples there.
        if found.device.type == "cpu" and len(found) and not 0 <= int(found.min()) <= int(found.max()) < domains:
            raise ConfigError(
                f"DomainReweighting got a batch whose `domain` is {found.tolist()}, but it must be an index from 0 to "
                f"{domains - 1} in the data module's `domain_names`."
            )
        return cls(batch["labels"], found)

    @property
    def token_counts(self) -> Tensor:
        """[B], the tokens of each sample that have a loss."""
        return (self.labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


class SampleLosses:
    """The summed token losses [B] and token counts [B] of the batch that a module has just seen.

    A module that computes them anyway hands them out: its step returns a mapping that holds `loss_sums` and
    `token_counts` (as `CausalLM` does). For any other the LM's logits are watched, without gradients, and the losses
    computed from them and from the batch's labels. Which it is, the first batch tells.

    Args:
        lm: the causal LM inside the module.
        watching: whether a forward pass now belongs to the batch.
    """

    def __init__(self, lm: PreTrainedModel, watching: Callable[[], bool]) -> None:
        self._watching = watching
        self._handle: RemovableHandle | None = lm.register_forward_hook(self._watch)
        self._batch: DomainBatch | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._ever = False

    def begin(self, batch: DomainBatch) -> None:
        """Expect the forward pass of this batch."""
        self._batch, self._seen = batch, None

    def take(self, outputs: object) -> tuple[Tensor, Tensor] | None:
        """The losses of the batch that has ended, whose step returned `outputs`; None if the module skipped it.

        Raises:
            ConfigError: neither the outputs nor the LM's logits told any from the first batch on.
        """
        seen, self._seen, self._batch = self._seen, None, None
        if isinstance(outputs, Mapping) and "loss_sums" in outputs and "token_counts" in outputs:
            self.close()
            seen = outputs["loss_sums"].detach(), outputs["token_counts"].detach()
        self._ever = self._ever or seen is not None
        if not self._ever:
            raise ConfigError(
                "DomainReweighting saw no losses in a batch: the module's step must call its causal LM on all of the "
                "batch's tokens, with logits of the shape [B, T, V] of the batch's labels [B, T], or return a mapping "
                "that holds `loss_sums` [B] and `token_counts` [B]."
            )
        return seen

    def close(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _watch(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        logits, batch = logits_of(output), self._batch
        if batch is None or self._seen is not None or not isinstance(logits, Tensor) or not self._watching():
            return
        if logits.shape[:-1] == batch.labels.shape:
            with torch.no_grad():
                self._seen = token_losses(logits, batch.labels)


class TrainingLosses:
    """The training tokens and losses of each domain, the same on all ranks.

    It stays on the device and on its rank: nothing here waits for a GPU, or another rank, before an update reads it.
    Whoever reads it brings the ranks together, so all of them must.

    Args:
        domains: how many there are, D.
        device: of the losses.
        all_reduce: sums a tensor over ranks.
    """

    def __init__(self, domains: int, device: torch.device, all_reduce: Callable[[Tensor], Tensor]) -> None:
        dtype = widest(device)
        self._all_reduce = all_reduce
        self._domains = domains
        # This rank's, since the last optimizer step; the last column is of samples that are of none of the domains.
        self._step = torch.zeros(3, domains + 1, dtype=dtype, device=device)
        self._steps: list[Tensor] = []  # the same of earlier steps, which the ranks have not shared yet
        self._strays = torch.zeros((), dtype=dtype, device=device)  # all ranks' tokens of such samples
        self._since = torch.zeros(2, domains, dtype=dtype, device=device)  # all ranks', since the last update
        self._tokens = torch.zeros(domains, dtype=torch.int64, device=device)
        self._mean = torch.full((domains,), torch.nan, dtype=dtype, device=device)

    def add(self, batch: DomainBatch, losses: tuple[Tensor, Tensor] | None) -> None:
        """Add a batch of this rank; its losses [B] and token counts [B] where they are known."""
        self._add(0, batch, batch.token_counts)
        for row, values in enumerate(losses or (), start=1):
            self._add(row, batch, values)

    def step(self) -> None:
        """An optimizer step is done. The ranks share it with those before, when somebody asks."""
        self._steps.append(self._step)
        self._step = torch.zeros_like(self._step)

    def share(self) -> None:
        """Sum over the ranks, in one reduction for all steps since the last time; every rank must call this."""
        if self._steps:
            for of_step in self._all_reduce(torch.stack(self._steps)):
                self._count(of_step)
            self._steps = []

    def _count(self, reduced: Tensor) -> None:
        """Count in what all ranks saw in a step, [3, D + 1].

        mean ← 0.9 mean + 0.1 loss, for the domains that the step's batches held; the first loss is the first mean. A
        loss that is not finite is passed over.
        """
        self._strays += reduced[0, -1]
        tokens, sums, counts = reduced[:, :-1]
        self._tokens += tokens.long()
        loss = sums / counts
        known = torch.isfinite(loss)
        self._mean = torch.where(known, torch.where(self._mean.isnan(), loss, self._mean.lerp(loss, EMA)), self._mean)
        self._since += torch.where(known, torch.stack([sums, counts]), 0)

    def check(self) -> None:
        """Refuse a run with a sample whose domain is unknown; waits for the device and the ranks.

        Raises:
            ConfigError: there was one, in a batch of any rank.
        """
        self.share()
        if self._strays > 0:
            raise ConfigError(
                f"DomainReweighting got a batch whose `domain` holds an index that is not from 0 to {self._domains - 1}"
                ": it must be each sample's place in the data module's `domain_names`."
            )

    def begin_interval(self) -> None:
        """Begin to count anew for `since_last_update`."""
        self._since.zero_()

    @property
    def tokens(self) -> Tensor:
        """[D] int64, trained since the run began."""
        self.share()
        return self._tokens

    @property
    def running_mean(self) -> Tensor:
        """[D] in nats per token; NaN for a domain that has not been seen."""
        self.share()
        return self._mean

    @property
    def since_last_update(self) -> Tensor:
        """[D] the mean per token since the last update; NaN for a domain that has not been seen since."""
        self.share()
        return self._since[0] / self._since[1]

    def state_dict(self) -> dict[str, Any]:
        self.share()
        return {
            "tokens": self._tokens.tolist(),
            "mean": self._mean.tolist(),
            "since": self._since.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tokens = torch.tensor(state["tokens"]).to(self._tokens)
        self._mean = torch.tensor(state["mean"], dtype=torch.float64).to(self._mean)
        self._since = torch.tensor(state["since"], dtype=torch.float64).to(self._since)

    def _add(self, row: int, batch: DomainBatch, values: Tensor) -> None:
        places = places_of(batch.domain, self._domains, self._domains).to(self._step.device)
        self._step[row].index_add_(0, places, values.detach().to(self._step))
