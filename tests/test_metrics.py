"""`DomainLoss` against plain loops."""

import math
import random

import pytest
import torch

from lightprune.errors import ConfigError
from lightprune.metrics import DomainLoss


def draw_batches(domains: int, seed: int = 0) -> list[list[tuple[float, int, int]]]:
    """Batches of (summed loss, tokens, domain), of different sizes."""
    rng = random.Random(seed)
    return [
        [(rng.uniform(0, 500), rng.randrange(1, 200), rng.randrange(domains)) for _ in range(size)]
        for size in (3, 1, 5, 2)
    ]


def feed(metric: DomainLoss, batch: list[tuple[float, int, int]], with_domain: bool = True) -> None:
    sums, counts, domain = zip(*batch, strict=True)
    metric.update(
        torch.tensor(sums, dtype=torch.float64),
        torch.tensor(counts),
        torch.tensor(domain) if with_domain else None,
    )


def test_equals_a_plain_loop() -> None:
    names = ["code", "web", "books"]
    batches = draw_batches(domains=3)
    metric = DomainLoss(names)
    for batch in batches:
        feed(metric, batch)

    result = metric.compute()

    samples = [sample for batch in batches for sample in batch]
    for index, name in [*enumerate(names), (None, None)]:
        mine = [s for s in samples if index is None or s[2] == index]
        mean = math.fsum(s[0] for s in mine) / sum(s[1] for s in mine)
        suffix = f"/{name}" if name else ""
        assert result[f"loss{suffix}"].item() == pytest.approx(mean, rel=1e-14)
        assert result[f"ppl{suffix}"].item() == pytest.approx(math.exp(mean), rel=1e-12)
    assert set(result) == {f"{kind}{s}" for kind in ("loss", "ppl") for s in ("", "/code", "/web", "/books")}


def test_weights_tokens_not_samples() -> None:
    metric = DomainLoss(["a"])
    metric.update(torch.tensor([10.0, 0.0]), torch.tensor([1, 9]), torch.tensor([0, 0]))

    assert metric.compute()["loss"].item() == 1.0


def test_batching_does_not_matter() -> None:
    batches = draw_batches(domains=2)
    apart, together = DomainLoss(["a", "b"]), DomainLoss(["a", "b"])
    for batch in batches:
        feed(apart, batch)
    feed(together, [sample for batch in batches for sample in batch])

    assert apart.compute().keys() == together.compute().keys()
    for name, value in apart.compute().items():
        assert value.item() == pytest.approx(together.compute()[name].item(), rel=1e-14)


def test_without_domains_only_totals() -> None:
    nameless, indexless = DomainLoss(), DomainLoss(["a", "b"])
    (batch, *_) = draw_batches(domains=2)
    feed(nameless, batch)
    feed(indexless, batch, with_domain=False)

    mean = sum(s[0] for s in batch) / sum(s[1] for s in batch)
    for metric in (nameless, indexless):
        result = metric.compute()
        assert set(result) == {"loss", "ppl"}
        assert result["loss"].item() == pytest.approx(mean, rel=1e-14)


def test_a_domain_without_tokens_is_left_out() -> None:
    metric = DomainLoss(["seen", "unseen"])
    metric.update(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([0]))

    assert set(metric.compute()) == {"loss", "ppl", "loss/seen", "ppl/seen"}


def test_sums_stay_exact_in_a_half_precision_module() -> None:
    metric = DomainLoss(["a"]).to(torch.bfloat16)
    assert metric.loss_sums.dtype == metric.token_counts.dtype == torch.float64  # so that ranks agree before any batch
    for _ in range(1000):
        metric.update(torch.tensor([1.0]), torch.tensor([3]), torch.tensor([0]))

    assert metric.compute()["loss"].dtype == torch.float64
    assert metric.compute()["loss"].item() == 1000 / 3000


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightprune.integrations.exact_metric.widest", lambda device: torch.float32)
    metric = DomainLoss(["a", "b"]).to("cpu")
    for evaluation in range(2):
        assert metric.loss_sums.dtype == metric.token_counts.dtype == torch.float32, evaluation
        metric.update(torch.tensor([6.0, 1.0]), torch.tensor([3, 1]), torch.tensor([0, 1]))
        result = metric.compute()
        assert {value.dtype for value in result.values()} == {torch.float32}
        assert [result[name].item() for name in ("loss", "loss/a", "loss/b")] == [1.75, 2.0, 1.0]
        metric.reset()
    monkeypatch.undo()
    assert metric.to("cpu").loss_sums.dtype == torch.float64


def test_reset_forgets() -> None:
    metric = DomainLoss(["a"])
    metric.update(torch.tensor([5.0]), torch.tensor([1]), torch.tensor([0]))
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([0]))

    assert metric.compute()["loss"].item() == 1.0


@pytest.mark.parametrize("index", [-1, 2, 3, 99])
def test_an_index_that_is_no_domains_is_found_when_the_values_are_read(index: int) -> None:
    metric = DomainLoss(["a", "b"])
    feed(metric, [(1.0, 1, 0), (1.0, 1, index)])
    with pytest.raises(ConfigError, match=r"not from 0 to 1: it must be each sample's place .* a, b"):
        metric.compute()
    metric.reset()
    feed(metric, [(1.0, 1, 0), (0.0, 0, index)])  # without a token it counts for nothing
    assert metric.compute()["loss"].item() == 1.0
