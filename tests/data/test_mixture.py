import itertools
import json
import re
from collections.abc import Iterable

import numpy as np
import pytest

from lightprune.data import MixtureSampler
from lightprune.errors import ConfigError

BLOCKS = {"a": 50, "b": 7, "c": 20}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}


def mixture(**options: object) -> MixtureSampler:
    return MixtureSampler(**{"blocks": BLOCKS, "weights": WEIGHTS, "batch_size": 4} | options)  # type: ignore[arg-type]


def flat(samples: Iterable[tuple[int, int]]) -> list[int]:
    """Samples as numbers: the blocks of a are 0 to 49, those of b 50 to 56, those of c 57 to 76."""
    return [(0, 50, 57)[domain] + block for domain, block in samples]


def consume(sampler: MixtureSampler, batches: int) -> list[list[int]]:
    """Batches without prefetching, as training would consume them."""
    found = []
    iterator = iter(sampler)
    for _ in range(batches):
        found.append(flat(itertools.islice(iterator, sampler.batch_size)))
        sampler.advance()
    return found


def reference(samples: int, *, seed: int) -> list[int]:
    """The documented formula, one sample after another in plain Python."""
    names, total = list(BLOCKS), sum(WEIGHTS.values())
    drawn = dict.fromkeys(names, 0)
    found = []
    for n in range(samples):
        left = np.random.Generator(np.random.Philox(key=seed, counter=n)).random() * total
        for name in names:
            left -= WEIGHTS[name]
            if left < 0:
                break
        index = names.index(name)
        epoch, place = divmod(drawn[name], BLOCKS[name])
        order = np.random.default_rng([seed, index, epoch]).permutation(BLOCKS[name])
        found.append(sum(list(BLOCKS.values())[:index]) + int(order[place]))
        drawn[name] += 1
    return found


def test_the_sequence_equals_its_formula() -> None:
    assert [i for batch in consume(mixture(seed=3), 100) for i in batch] == reference(400, seed=3)


def test_realized_frequencies_are_the_weights() -> None:
    n = 20_000
    samples = np.concatenate(consume(mixture(batch_size=100), n // 100))
    counts = np.histogram(samples, bins=[0, 50, 57, 77])[0]
    shares = np.array([1, 2, 5]) / 8
    assert np.all(np.abs(counts - n * shares) < 4 * np.sqrt(n * shares * (1 - shares)))


def test_a_domain_repeats_a_block_only_after_all_of_them() -> None:
    samples = np.concatenate(consume(mixture(), 300))
    for low, high in ((0, 50), (50, 57), (57, 77)):
        own = samples[(samples >= low) & (samples < high)]
        passes = [own[i : i + high - low] for i in range(0, len(own) - (high - low), high - low)]
        assert all(sorted(one) == list(range(low, high)) for one in passes)
        assert len(passes) < 2 or passes[0].tolist() != passes[1].tolist()


def test_a_domain_of_weight_zero_never_comes() -> None:
    for weights in ({"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 0}):
        samples = np.concatenate(consume(mixture(weights=weights), 500))
        absent = (0, 50) if weights["a"] == 0 else (57, 77)
        assert not np.any((samples >= absent[0]) & (samples < absent[1]))


def test_seeds_differ() -> None:
    assert consume(mixture(seed=1), 5) != consume(mixture(seed=2), 5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_sequence_of_one_rank(ranks: int) -> None:
    per_rank = [consume(mixture(num_replicas=ranks, rank=rank), 40) for rank in range(ranks)]
    whole = consume(mixture(batch_size=4 * ranks), 40)
    for step, batch in enumerate(whole):
        shares = [per_rank[rank][step] for rank in range(ranks)]
        assert [index for group in zip(*shares, strict=True) for index in group] == batch
    # As long as no domain has come round, no block is on two ranks.
    first = [index for rank in range(ranks) for batch in per_rank[rank][:1] for index in batch]
    assert len(set(first)) == len(first)


def test_length_is_the_batches_that_the_blocks_fill() -> None:
    assert len(mixture()) // 4 == 77 // 4
    assert len(mixture(num_replicas=3, rank=1)) // 4 == 77 // 12


def test_resume_goes_on_with_the_next_consumed_batch() -> None:
    whole = consume(mixture(), 60)
    stopped = mixture()
    consume(stopped, 23)
    iterator = iter(stopped)
    for _ in range(9 * 4):  # prefetched, never consumed
        next(iterator)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = mixture(weights={"a": 1, "b": 1, "c": 1})  # the checkpoint's weights count
    resumed.load_state_dict(state)
    assert consume(resumed, 37) == whole[23:]
    assert consume(stopped, 37) == whole[23:], "a new iterator goes on after the last consumed batch too"


def prefetching_run(sampler: MixtureSampler, steps: range, *, lag: int) -> list[list[int]]:
    """Training with workers that are `lag` batches ahead, and weights that change after every 7th batch."""
    iterator = iter(sampler)
    ahead: list[list[int]] = []
    found = []
    for step in steps:
        while len(ahead) <= lag:
            ahead.append(flat(itertools.islice(iterator, sampler.batch_size)))
        found.append(ahead.pop(0))
        sampler.advance()
        if step % 7 == 6:
            sampler.set_weights({"a": 1, "b": step, "c": step % 3})
    return found


@pytest.mark.parametrize("lag", [0, 3, 10])
def test_resume_is_exact_while_weights_change(lag: int) -> None:
    whole = prefetching_run(mixture(weights_lag=lag), range(60), lag=lag)
    for stop in range(0, 60, 4):
        stopped = mixture(weights_lag=lag)
        prefetching_run(stopped, range(stop), lag=lag)
        resumed = mixture(weights_lag=lag)
        resumed.load_state_dict(stopped.state_dict())
        assert prefetching_run(resumed, range(stop, 60), lag=lag) == whole[stop:]


@pytest.mark.parametrize("lag", [0, 5])
def test_new_weights_act_on_batches_not_yet_drawn(lag: int) -> None:
    sampler = mixture(weights_lag=lag, weights={"a": 1, "b": 0, "c": 0})
    found = prefetching_run(sampler, range(6), lag=lag)
    sampler.set_weights({"a": 0, "b": 0, "c": 1})
    assert sampler.weights == {"a": 0, "b": 0, "c": 1}
    found += prefetching_run(sampler, range(lag), lag=lag)
    assert all(index < 50 for batch in found for index in batch)
    assert all(index >= 57 for batch in consume(sampler, 5) for index in batch)


def test_weights_set_before_training_act_at_once() -> None:
    sampler = mixture(weights_lag=5)
    sampler.set_weights({"a": 0, "b": 1, "c": 0})
    assert all(50 <= index < 57 for batch in consume(sampler, 10) for index in batch)


def test_the_state_does_not_grow() -> None:
    sampler = mixture(weights_lag=4)
    sizes = []
    iterator = iter(sampler)
    ahead = 0
    for step in range(2000):
        while ahead <= 4 * 4:
            next(iterator)
            ahead += 1
        sampler.advance()
        ahead -= 4
        sampler.set_weights({"a": 1.0, "b": 1.0, "c": float(step % 10)})
        sizes.append(len(sampler.state_dict()["weights"]))
    assert max(sizes[100:]) == max(sizes[:100]) <= 6
    assert len(json.dumps(sampler.state_dict())) < 1000


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": 1, "z": 1}, "data.weights names 'z', but data.domains has only: a, b, c."),
        ({"a": 1, "b": -1, "c": 1}, "data.weights.b is -1, but must be 0 or a positive number."),
        ({"a": 1, "b": 1, "c": float("nan")}, "data.weights.c is nan, but must be"),
        ({"a": 1, "b": 1}, "data.weights names no weight for 'c'; write 0 to leave a domain out of training."),
        ({"a": 0, "b": 0, "c": 0}, "data.weights are all 0, but at least one domain must have a positive weight."),
    ],
)
def test_weights_that_cannot_work_are_refused(weights: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        mixture(weights=weights)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        mixture().set_weights(weights)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = mixture().state_dict()
    with pytest.raises(
        ConfigError, match=r"written with data.domains = .*'blocks': 50.* but this run has .*'blocks': 51"
    ):
        mixture(blocks=BLOCKS | {"a": 51}).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written with data.domains = "):
        mixture(blocks=dict(reversed(BLOCKS.items()))).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written with data.seed = 0, but this run has 1"):
        mixture(seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written with data.batch_size x number of ranks = 4, but this run has 8"):
        mixture(num_replicas=2).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written with data.weights_lag = 0, but this run has 3"):
        mixture(weights_lag=3).load_state_dict(state)


def test_what_was_seen_is_counted_on_all_ranks_together() -> None:
    sampler = mixture(num_replicas=2, rank=1, seed=3)
    assert sampler.samples_seen == {"a": 0, "b": 0, "c": 0}
    consume(sampler, 30)
    seen = np.histogram(reference(240, seed=3), bins=[0, 50, 57, 77])[0].tolist()
    assert list(sampler.samples_seen.values()) == seen
    assert list(sampler.epochs_seen.values()) == pytest.approx([seen[0] / 50, seen[1] / 7, seen[2] / 20])
