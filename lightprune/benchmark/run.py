"""Models beside each other: every one has its turn in each round, so that a noisy machine is noisy for all."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.benchmark.speed import Sweep, Taken, taken
from lightprune.costs import Costs, Workload, costs_of
from lightprune.plan import PruningPlan

Document = dict[str, Any]
Progress = Callable[[int, int], None]  # turns done, and turns there are


def benchmark(
    models: Mapping[str, PreTrainedModel], sweep: Sweep, progress: Progress = lambda done, all: None
) -> Document:
    """Measure models, and compare each with the first.

    Args:
        models: by name, on the device and in the dtype that they are to serve in.
        sweep: what is measured.
        progress: called after every turn of a model.

    Returns:
        Plain JSON values: `device`, `dtype`, `threads`, and for each of `models` its `name`, `parameters`, `weights`
        (bytes), `cache_per_token` (bytes), on CUDA its `peak` (bytes), and `runs`: for each batch and prompt `first`
        (seconds to the first token) and `token` (seconds of each after it), both as median, least and greatest, and
        `speedup`, `ideal` and `reached`, each for "first" and "token". The ideal is the ratio of FLOPs for a prompt,
        and of the bytes that are read for a token, see `lightprune.costs`; reached is the share of it.
    """
    times = _times(models, sweep, progress)
    costs = {
        (name, batch, prompt): _costs(lm, batch, prompt, sweep.tokens)
        for name, lm in models.items()
        for batch, prompt in sweep.settings()
    }
    base, lm = next(iter(models.items()))
    return {
        "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "models": [
            {
                "name": name,
                **_sizes(costs[name, sweep.batches[0], sweep.prompts[0]]),
                "peak": max((one.peak for rounds in times[name].values() for one in rounds), default=0) or None,
                "runs": [
                    {
                        "batch": batch,
                        "prompt": prompt,
                        **_compared(
                            times[name][batch, prompt],
                            times[base][batch, prompt],
                            costs[name, batch, prompt],
                            costs[base, batch, prompt],
                        ),
                    }
                    for batch, prompt in sweep.settings()
                ],
            }
            for name in models
        ],
    }


Times = dict[tuple[int, int], list[Taken]]  # of one model: its rounds, by batch and prompt


def _times(models: Mapping[str, PreTrainedModel], sweep: Sweep, progress: Progress) -> dict[str, Times]:
    times: dict[str, Times] = {name: {setting: [] for setting in sweep.settings()} for name in models}
    rounds = sweep.warmup + sweep.repeats
    turns, done = len(models) * rounds * len(list(sweep.settings())), 0
    for batch, prompt in sweep.settings():
        generator = torch.Generator().manual_seed(0)
        for number in range(rounds):
            # There and back: who is always second would always find what the first has left in caches.
            for name in list(models)[:: 1 if number % 2 == 0 else -1]:
                lm = models[name]
                ids = torch.randint(lm.config.get_text_config().vocab_size, (batch, prompt), generator=generator)
                one = taken(lm, ids.to(lm.device), sweep.tokens)
                if number >= sweep.warmup:
                    times[name][batch, prompt].append(one)
                done += 1
                progress(done, turns)
    return times


def _costs(lm: PreTrainedModel, batch: int, prompt: int, tokens: int) -> Costs:
    anatomy = anatomy_of(lm)
    return costs_of(anatomy, PruningPlan.of(anatomy), Workload(prompt, prompt + tokens // 2, batch))


def _sizes(costs: Costs) -> dict[str, int]:
    return {"parameters": costs.parameters, "weights": costs.weights, "cache_per_token": costs.cache_per_token}


def _compared(ours: Sequence[Taken], base: Sequence[Taken], costs: Costs, base_costs: Costs) -> Document:
    mine = {"first": [one.first for one in ours], "token": [one.token for one in ours]}
    theirs = {"first": [one.first for one in base], "token": [one.token for one in base]}
    ideal = dict(zip(mine, base_costs.slower_than(costs), strict=True))
    # Of the same round: what slows a machine down for seconds slows both down.
    speedup = {
        key: statistics.median(b / m for b, m in zip(theirs[key], values, strict=True)) for key, values in mine.items()
    }
    return {
        **{key: _spread(values) for key, values in mine.items()},
        "speedup": speedup,
        "ideal": ideal,
        "reached": {key: speedup[key] / ideal[key] for key in speedup},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
