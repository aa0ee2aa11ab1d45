import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightprune.errors import ConfigError
from lightprune.metrics import token_losses
from lightprune.reweighting.losses import DomainBatch, SampleLosses, TrainingLosses
from tests.families import tiny_lm, tokens


def batch_of(domain: list[int], seed: int = 0) -> DomainBatch:
    return DomainBatch(tokens(len(domain), 6, seed), torch.tensor(domain))


def losses_of(sums: list[float], counts: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(sums), torch.tensor(counts)


def alone(sums: Tensor) -> Tensor:
    return sums


def test_running_means_follow_a_loop() -> None:
    training = TrainingLosses(3, torch.device("cpu"), alone)
    steps: list[list[tuple[int, float, int]]] = [
        [(0, 6.0, 2), (1, 5.0, 5), (0, 3.0, 1)],
        [(1, 4.0, 2)],
        [(0, math.nan, 2), (1, 1.0, 2)],  # such a loss is passed over
        [(0, 8.0, 4), (1, 9.0, 3)],
    ]
    means: dict[int, float] = {}
    for samples in steps:
        for half in filter(None, (samples[:2], samples[2:])):  # two batches accumulate
            domains, sums, counts = ([s[i] for s in half] for i in range(3))
            training.add(batch_of(domains), losses_of(sums, counts))
        training.step()
        for domain in {s[0] for s in samples}:
            loss = sum(s[1] for s in samples if s[0] == domain) / sum(s[2] for s in samples if s[0] == domain)
            if math.isfinite(loss):
                means[domain] = 0.9 * means[domain] + 0.1 * loss if domain in means else loss
    found = training.running_mean.tolist()
    assert found[:2] == pytest.approx([means[0], means[1]])
    assert math.isnan(found[2])
    since = training.since_last_update.tolist()
    assert since[:2] == pytest.approx([(6 + 3 + 8) / (3 + 4), (5 + 4 + 1 + 9) / (5 + 2 + 2 + 3)])
    training.begin_interval()
    assert training.since_last_update.isnan().all()
    # 5 of each sample's 6 tokens have a loss, whatever the module counted.
    assert training.tokens.tolist() == [20, 20, 0]


def test_ranks_add_up() -> None:
    """What a rank adds is summed with the others' before anything is divided."""
    others = torch.tensor([[10.0, 0.0, 0.0], [9.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    training = TrainingLosses(2, torch.device("cpu"), lambda mine: mine + others)
    training.add(batch_of([0]), losses_of([6.0], [2]))
    training.step()
    assert training.tokens.tolist() == [15, 0]
    assert training.running_mean.tolist()[0] == pytest.approx(15 / 5)


def test_tokens_count_without_losses_too_and_padding_does_not() -> None:
    training = TrainingLosses(2, torch.device("cpu"), alone)
    labels = torch.tensor([[1, 2, 3, -100], [-100, -100, -100, -100]])
    training.add(DomainBatch(labels, torch.tensor([1, 0])), None)
    training.step()
    assert training.tokens.tolist() == [0, 2]
    assert training.running_mean.isnan().all()


def test_training_losses_go_on_from_their_state() -> None:
    one, other = (TrainingLosses(2, torch.device("cpu"), alone) for _ in range(2))
    for training in (one, other):
        training.add(batch_of([0, 1]), losses_of([1.7, 0.3], [3, 7]))
        training.step()
    resumed = TrainingLosses(2, torch.device("cpu"), alone)
    resumed.load_state_dict(one.state_dict())
    for training in (other, resumed):
        training.add(batch_of([0, 0]), losses_of([1.1, 0.1], [3, 7]))
        training.step()
    assert resumed.state_dict() == other.state_dict()


def test_the_lms_logits_are_watched() -> None:
    lm, batch = tiny_lm(), batch_of([0, 1])
    watched = SampleLosses(lm, lambda: torch.is_grad_enabled())
    watched.begin(batch)
    with torch.no_grad():
        lm(input_ids=torch.zeros_like(batch.labels))  # some forward pass on the side
    output = lm(input_ids=batch.labels)
    lm(input_ids=batch.labels[:, :3])
    found = watched.take(None)
    assert found is not None
    for ours, theirs in zip(found, token_losses(output.logits, batch.labels), strict=True):
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)
    assert watched.take({"loss": None}) is None  # a batch that the module skipped
    watched.close()
    assert not lm._forward_hooks


def test_losses_that_a_module_hands_out_need_no_hook() -> None:
    lm, batch = tiny_lm(), batch_of([0, 1])
    watched = SampleLosses(lm, lambda: True)
    sums = torch.tensor([1.0, 2.0], requires_grad=True)
    watched.begin(batch)
    lm(input_ids=batch.labels)
    found = watched.take({"loss": sums.sum(), "loss_sums": sums, "token_counts": torch.tensor([5, 5])})
    assert found is not None
    assert found[0].tolist() == [1.0, 2.0]
    assert not found[0].requires_grad
    assert not lm._forward_hooks


@pytest.mark.parametrize("output", [SimpleNamespace(logits=None), SimpleNamespace(logits=torch.zeros(2, 1, 8)), ()])
def test_a_module_that_tells_nothing_is_refused(output: Any) -> None:
    lm, batch = tiny_lm(), batch_of([0, 1])
    watched = SampleLosses(lm, lambda: True)
    lm.register_forward_hook(lambda module, args, found: output, prepend=True)
    watched.begin(batch)
    lm(input_ids=batch.labels)
    with pytest.raises(ConfigError, match=r"saw no losses.*loss_sums"):
        watched.take(torch.tensor(1.0))


LABELS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([LABELS], "`labels`"),
        ({"labels": LABELS}, "`domain`"),
        ({"labels": LABELS[0], "domain": torch.tensor([0, 1])}, "`labels`"),
        ({"labels": LABELS, "domain": 1}, "`domain`"),
        ({"labels": LABELS, "domain": torch.zeros(2)}, "`domain`"),
        ({"labels": LABELS, "domain": torch.tensor([0, 2])}, r"\[0, 2\].*from 0 to 1"),
    ],
)
def test_batches_that_tell_no_domain_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DomainBatch.of(batch, 2)


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_a_domain_that_is_none_is_found_without_waiting_for_a_device(index: int) -> None:
    """As a GPU's batches are treated; those of a CPU are refused as they come."""
    losses = TrainingLosses(2, torch.device("cpu"), lambda sums: 2 * sums)
    labels = torch.ones(2, 3, dtype=torch.int64)
    losses.add(DomainBatch(labels, torch.tensor([0, 1])), (torch.ones(2), torch.ones(2)))
    losses.step()
    losses.check()
    losses.add(DomainBatch(labels, torch.tensor([0, index])), (torch.ones(2), torch.ones(2)))
    losses.step()
    assert losses.tokens.tolist() == [8, 4]
    with pytest.raises(ConfigError, match="`domain` holds an index that is not from 0 to 1"):
        losses.check()
