"""Which domain weights recover a pruned model best: SmolLM2-135M without 8 of its 30 layers, on four unlike domains.

    python benchmarks/domains.py run --wikitext wikitext2-valid.txt --gsm8k gsm8k.jsonl --shakespeare shakespeare.txt
    python benchmarks/domains.py table

The fourth domain is Python's own source. Every row starts from the same cut (ShortGPT's layers, chosen on the seed's
first batches), trains the same number of tokens at the same learning rate, and begins with the same mixture, in which
the two larger domains weigh twice as much as the others. (A ratio that is equal for all could not follow the weights:
it stays between the least and the greatest share that it began with.)

A row's numbers are the excess of each domain's held-out loss over that of the dense model, in nats per token: the
largest and the mean. The fixed references are the final losses of the first row's first seed: what a model of this size
comes to without any reweighting (an oracle, since it takes a run to know them).

One JSON line a run; a run that is there already is skipped.
"""

import argparse
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import quiet
import torch
from quality import BATCH, BLOCK, RESULTS, SEEDS, Results, fit, spread

import lightprune as lp
from lightprune.data import Source, TextDataModule

DROP, WINDOW = 8, 8
TOKENS = 65_536
EVERY = 2  # optimizer steps from one reweighting to the next
LEARNING_RATE = 4e-4  # the best one of finetuning after a cut in depth: benchmarks/depth.py
HELD_OUT_BLOCKS = 24
WEIGHTS = {"wikitext": 1.0, "gsm8k": 2.0, "shakespeare": 1.0, "python": 2.0}

Losses = Mapping[str, float]
CONSTANT = "constant weights"


# The callback of each row; it may take the fixed references.
ROWS: dict[str, Callable[[Losses], lp.DomainReweighting]] = {
    CONSTANT: lambda fixed: lp.DomainReweighting(rule="constant", every=EVERY),
    "Sheared LLaMA's rule": lambda fixed: lp.DomainReweighting(rule="sheared", every=EVERY),
    "robust, fixed reference": lambda fixed: lp.DomainReweighting(reference=dict(fixed), every=EVERY),
    "robust, source reference": lambda fixed: lp.DomainReweighting(every=EVERY),
    "robust, dynamic reference": lambda fixed: lp.DomainReweighting(reference="dynamic", every=EVERY),
    "robust, dynamic reference and ratio": lambda fixed: lp.DomainReweighting(
        reference="dynamic", dynamic_ratio=True, every=EVERY
    ),
}


class Bench:
    """The runs that the table needs, each made once."""

    def __init__(self, results: Results, files: Mapping[str, Path]) -> None:
        self.results = results
        self.files = files
        # Runs on other texts are other runs.
        self.texts = hashlib.sha256(b"".join(path.read_bytes() for path in files.values())).hexdigest()[:12]
        self.scratch = RESULTS / "scratch" / self.texts
        self.scratch.mkdir(parents=True, exist_ok=True)

    def data(self, seed: int) -> TextDataModule:
        """The four domains, with the weights that every row begins with."""
        sources = {name: Source(files=str(path)) for name, path in self.files.items()}
        sources["python"] = Source(builtin="python-source")
        return TextDataModule(
            sources,
            block_size=BLOCK,
            batch_size=BATCH,
            weights=WEIGHTS,
            validation=HELD_OUT_BLOCKS,
            num_workers=0,
            seed=seed,
        )

    def run(self, row: str, seed: int) -> None:
        """Make one row's numbers for one seed."""
        key = {"texts": self.texts, "row": row, "seed": seed}
        if self.results.find(**key) is not None:
            return
        steps = TOKENS // (BATCH * BLOCK)
        callbacks = [
            lp.BlockInfluenceSelector(drop=DROP, stop=WINDOW),
            lp.StructuredCut(at=WINDOW, validate=False),
            ROWS[row](self.fixed_reference() if "fixed" in row else {}),
        ]
        data = self.data(seed)
        ppl, seconds = fit(data, steps, seed, callbacks, LEARNING_RATE, scratch=self.scratch)
        losses = {name: math.log(value) for name, value in ppl.items()}
        self.results.add(**key, losses=losses, weights=data.weights, tokens=data.tokens_seen, seconds=seconds)

    def dense(self) -> None:
        """The losses of the model that is not pruned."""
        key = {"texts": self.texts, "row": "dense", "seed": 0}
        if self.results.find(**key) is None:
            ppl, _ = fit(self.data(0), 0, 0, [], 0.0, scratch=self.scratch)
            self.results.add(**key, losses={name: math.log(value) for name, value in ppl.items()})

    def fixed_reference(self) -> Losses:
        """What the first row comes to."""
        self.run(CONSTANT, 0)
        run = self.results.find(texts=self.texts, row=CONSTANT, seed=0)
        assert run is not None
        losses: Losses = run["losses"]
        return losses


def table(results: Results) -> Iterator[str]:
    """The results as Markdown: medians over seeds, and how far apart the seeds are."""
    dense = results.find(row="dense")
    if dense is None:
        yield "Nothing is run yet."
        return
    domains = list(dense["losses"])
    yield f"| row | worst | mean | {' | '.join(domains)} | seeds |"
    yield "|---" * (len(domains) + 4) + "|"
    of_dense = " | ".join(f"{dense['losses'][name]:.3f}" for name in domains)
    yield f"| dense, loss | | | {of_dense} | |"
    for row in ROWS:
        runs = [run for run in results.runs if run["row"] == row]
        if not runs:
            yield f"| {row} | not run yet | | {' | ' * (len(domains) - 1)} | 0 |"
            continue
        excess = [{name: run["losses"][name] - dense["losses"][name] for name in domains} for run in runs]
        worst = [max(by_domain.values()) for by_domain in excess]
        mean = [statistics.fmean(by_domain.values()) for by_domain in excess]
        each = " | ".join(f"{statistics.median(by_domain[name] for by_domain in excess):.3f}" for name in domains)
        yield f"| {row} | {spread(worst, nats)} | {spread(mean, nats)} | {each} | {len(runs)} |"


def nats(value: float) -> str:
    """A loss as the table writes it."""
    return f"{value:.3f}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    for name in ("wikitext", "gsm8k", "shakespeare"):
        parser.add_argument(f"--{name}", type=Path, help="a text or JSONL file")
    parser.add_argument("--results", type=Path, default=RESULTS / "domains.jsonl")
    parser.add_argument("--rows", nargs="*", default=tuple(ROWS), choices=tuple(ROWS), help="only these rows")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="only these seeds")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.command == "run":
        files = {name: getattr(arguments, name) for name in ("wikitext", "gsm8k", "shakespeare")}
        if None in files.values():
            parser.error("`run` needs --wikitext, --gsm8k and --shakespeare")
        quiet.be_quiet()
        torch.set_float32_matmul_precision("high")
        bench = Bench(results, files)
        bench.dense()
        for seed in arguments.seeds:
            for row in arguments.rows:
                bench.run(row, seed)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
