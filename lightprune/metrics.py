"""Exact token-weighted loss and perplexity, per domain of the data and over all of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightprune.errors import ConfigError
from lightprune.integrations.exact_metric import ExactMetric

IGNORE_INDEX = -100
"""The label that no loss counts."""


def places_of(domain: Tensor, domains: int, other: int) -> Tensor:
    """The indices [B] of domains from 0 to `domains` - 1, and `other` for all that are not; waits for no device."""
    return torch.where((domain >= 0) & (domain < domains), domain, other)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy of each sample, summed over its tokens.

    Args:
        logits: [B, T, V] scores, of any floating dtype; the entropy itself is computed in float32.
        labels: [B, T] token ids, not shifted; -100 is ignored.

    Returns:
        loss_sums [B] in nats, and token_counts [B]: how many labels each sum is over.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    # Sample by sample: as fast as all at once, and the float32 copy of the logits exists for one sample only.
    loss_sums = [
        F.cross_entropy(sample.float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
        for sample, target in zip(logits.unbind(), targets.unbind(), strict=True)
    ]
    return torch.stack(loss_sums), (targets != IGNORE_INDEX).sum(dim=1)


class DomainLoss(ExactMetric):
    """Mean loss per token and its perplexity, for each domain and in total.

    loss_d = (sum of the token losses of d's samples) / (number of those tokens); ppl_d = exp(loss_d).
    The sums are float64 and are added up over ranks: how samples fall into batches and ranks does not matter. On a
    device that has no float64 (MPS) they are float32.

    Args:
        domain_names: names of the domains, in the order of their indices; may be empty.
    """

    full_state_update = False
    loss_sums: Tensor
    token_counts: Tensor

    def __init__(self, domain_names: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.domain_names = tuple(domain_names)
        # Two places more than there are domains: for samples that state none, and for those of none of these domains.
        zeros = torch.zeros(len(self.domain_names) + 2, dtype=torch.float64)
        self.add_state("loss_sums", default=zeros, dist_reduce_fx="sum")
        self.add_state("token_counts", default=zeros.clone(), dist_reduce_fx="sum")

    def update(self, loss_sums: Tensor, token_counts: Tensor, domain: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            loss_sums: [B] sum of the token losses of each sample, in nats.
            token_counts: [B] how many tokens each sum is over.
            domain: [B] index of each sample's domain; None counts toward the total only.
        """
        if domain is None or not self.domain_names:
            domain = torch.full_like(token_counts, len(self.domain_names), dtype=torch.int64)
        else:
            domain = places_of(domain, len(self.domain_names), len(self.domain_names) + 1).to(self.loss_sums.device)
        self.loss_sums = self.loss_sums.index_add(0, domain, loss_sums.detach().to(self.loss_sums))
        self.token_counts = self.token_counts.index_add(0, domain, token_counts.to(self.token_counts))

    def compute(self) -> dict[str, Tensor]:
        """Means and perplexities as scalars of the sums' dtype.

        Returns:
            "loss" and "ppl" over everything; "loss/<domain>" and "ppl/<domain>" where a domain had tokens.

        Raises:
            ConfigError: a sample with tokens stated an index that is none of a domain.
        """
        if self.domain_names and self.token_counts[-1] > 0:
            raise ConfigError(
                f"A batch's `domain` holds an index that is not from 0 to {len(self.domain_names) - 1}: it must be "
                f"each sample's place in the data module's `domain_names`, {', '.join(self.domain_names)}."
            )
        means = {"": self.loss_sums.sum() / self.token_counts.sum()}
        for name, loss_sum, count in zip(self.domain_names, self.loss_sums, self.token_counts, strict=False):
            if count > 0:
                means[f"/{name}"] = loss_sum / count
        losses = {f"loss{suffix}": mean for suffix, mean in means.items()}
        return losses | {f"ppl{suffix}": mean.exp() for suffix, mean in means.items()}
