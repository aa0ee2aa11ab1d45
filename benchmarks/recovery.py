"""How much of a model comes back: every row cuts the same layers or channels, and sees the same tokens.

    python benchmarks/recovery.py run --own own.jsonl --wikitext wikitext2-valid.txt --gsm8k gsm8k-train.jsonl
    python benchmarks/recovery.py table

The training text is what the dense model writes itself (`lightprune generate`, or any file), so what is measured is
recovery, and not how fast a model takes on the style of some corpus. A row's number is the excess over the dense model,
in nats a token, on text of its own that is held out, on WikiText-2 and on GSM8K, and the mean of the three: 48 blocks
of 256 tokens each. Beside it stands how often a model ranks a true continuation above another piece of the same text.

A row has 128 steps of 4 blocks, with those that choose what goes. A refit reads the batches that are trained on next.
FLOPs are counted beside the tokens, a teacher's and a refit's too. The learning rate of a row is the best of its grid
on seed 0, at full length; rows that differ only before training share it. Rows: `recovery_rows.py`.

Every run appends a JSON line to the results, and one that is there is skipped. `table` also writes `targets.json`.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from quality import MODEL, RESULTS, Results, spread
from ranking import accuracy
from recovery_rows import BATCH, BLOCK, BY_NAME, CUTS, ROWS, STEPS, Row, rows_of
from recovery_targets import targets
from torch.optim import AdamW

import lightprune as lp
from lightprune.data import Source, TextDataModule

HELD_OUT = 48
TEXTS = ("own", "wikitext", "gsm8k")


class Maker:
    """Makes single runs.

    Args:
        sources: the files of the texts.
        model: what is pruned.
        accelerator: where.
    """

    def __init__(self, sources: dict[str, Path], model: str, accelerator: str) -> None:
        self.sources = sources
        self.model = model
        self.accelerator = accelerator

    def __call__(self, cut: str | None, name: str, lr: float, seed: int) -> dict[str, Any]:
        """What a row comes to; without a cut, what the dense model does."""
        quiet.be_quiet()
        torch.set_float32_matmul_precision("high")
        L.seed_everything(seed, verbose=False)
        module = lp.CausalLM(self.model, optimizer=partial(AdamW, lr=lr or 1e-4, betas=(0.9, 0.95), weight_decay=0.0))
        steps = 0 if cut is None else BY_NAME[name].steps
        callbacks: list[Callback] = []
        if cut is not None:
            callbacks = BY_NAME[name].parts(cut, steps)
            if lr:
                callbacks.append(lp.Recovery(lr=lr, warmup_steps=6, decay="linear"))
        trainer = L.Trainer(
            **{**quiet.TRAINER, "accelerator": self.accelerator},
            devices=1,
            max_steps=steps,
            callbacks=callbacks,
            val_check_interval=steps + 1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            default_root_dir=RESULTS / "scratch",
        )
        data = self._data(seed, BY_NAME[name].text if cut else TEXTS[0])
        before = time.perf_counter()
        if steps:
            trainer.fit(module, data)
        seconds = time.perf_counter() - before
        metrics = trainer.validate(module, data, verbose=False)[0]
        lm = module.lm.eval().to("cuda" if self.accelerator == "gpu" else "cpu")
        return {
            "loss": {name: metrics[f"val/loss/{name}"] for name in self.sources},
            "right": accuracy(lm, (batch["input_ids"] for batch in data.val_dataloader())),
            "parameters": lm.num_parameters(),
            **(charged(callbacks, steps) if callbacks else {"tokens": 0, "flops": 0.0}),
            "dropped": next((list(part.plan.dropped_layers) for part in cuts_of(callbacks)), []),
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name() if self.accelerator == "gpu" else "cpu",
        }

    def _data(self, seed: int, text: str) -> TextDataModule:
        sources = {name: Source(files=str(path)) for name, path in self.sources.items()}
        return TextDataModule(
            sources,
            block_size=BLOCK,
            batch_size=BATCH,
            weights={name: float(name == text) for name in sources},
            validation=HELD_OUT,
            num_workers=0,
            seed=seed,
        )


def cuts_of(callbacks: Sequence[Callback]) -> list[lp.StructuredCut]:
    """The cuts of a run, in their order."""
    return sorted((part for part in callbacks if isinstance(part, lp.StructuredCut)), key=lambda part: part.at)


def charged(callbacks: Sequence[Callback], steps: int) -> dict[str, Any]:
    """The tokens that a run's models train on or look at, each counted once, and the FLOPs of all passes.

    A pass forward is 2 for each parameter and token, one backward 4, of which gradients of weights are the half. A
    selector that holds the weights needs none of those.
    """
    cuts = cuts_of(callbacks)
    dense = cuts[0].parameters["before"]
    tokens = BATCH * BLOCK
    read, flops = [steps], 0.0
    for begin, end in zip([0, *(cut.at for cut in cuts)], [*(cut.at for cut in cuts), steps], strict=True):
        parameters = dense if begin == 0 else next(cut for cut in cuts if cut.at == begin).parameters["after"]
        for part in callbacks:
            if isinstance(part, lp.selectors.Selector) and begin <= part.start < end and part.hold_weights:
                gates = isinstance(part, (lp.LayerGateSelector, lp.ProjectedGateSelector))
                flops += (4.0 if gates else 2.0) * parameters * (part.stop - part.start) * tokens
                begin = part.stop
        flops += 6.0 * parameters * (end - begin) * tokens
    for part in callbacks:
        if isinstance(part, lp.Distillation):
            flops += 2.0 * dense * (steps - part.begins) * tokens
        elif hasattr(part, "batches"):
            for cut in cuts:
                flops += 2.0 * (dense + 3 * cut.parameters["after"]) * part.batches * tokens
                read.append(cut.at + part.batches)
    return {"tokens": max(read) * tokens, "flops": flops}


def excess(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Nats a token over the dense model, on each text, and their mean; the share of pairs that are ranked right."""
    over = {name: run["loss"][name] - dense["loss"][name] for name in TEXTS}
    return {**over, "mean": statistics.fmean(over.values()), "right": run["right"]}


class Found:
    """The results, and what they come to."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.dense = results.find(kind="dense")

    def rate(self, cut: str, row: Row) -> float | None:
        """The rate of the row, or of the one that it shares it with, whose mean excess on seed 0 is the least."""
        if row.like is not None:
            return self.rate(cut, BY_NAME[row.like])
        runs = [r for lr in row.rates or (0.0,) if (r := self.run(cut, row, lr, 0)) is not None]
        return min(runs, key=lambda run: excess(run, self.dense or {})["mean"])["lr"] if runs else None

    def runs(self, cut: str, row: Row) -> list[dict[str, Any]]:
        """The runs of a row at its best rate, for every seed."""
        rate = self.rate(cut, row)
        runs = [run for run in self.results.runs if run.get("cut") == cut and run.get("row") == row.name]
        return [run for run in runs if run["lr"] == rate]

    def of(self, cut: str, row: Row) -> list[dict[str, float]]:
        """What these came to."""
        return [excess(run, self.dense or {}) for run in self.runs(cut, row)]

    def value(self, cut: str, name: str, on: str = "mean") -> float | None:
        """The median over seeds of a row's excess."""
        values = [one[on] for one in self.of(cut, BY_NAME[name])]
        return statistics.median(values) if values else None

    def run(self, cut: str, row: Row, lr: float, seed: int) -> dict[str, Any] | None:
        """The run with this key."""
        return self.results.find(kind="result", cut=cut, row=row.name, lr=lr, seed=seed)


# Rows whose numbers carry the conclusions have three seeds, the others two; rows of many tokens have one.
THREE = ("cut, finetuned", "cut, distilled", "cut, refitted, distilled", "cut, refitted, distilled (half)")


def seeds_of(row: Row) -> Sequence[int]:
    """The seeds that a row has."""
    if row.steps > STEPS or not (row.rates or row.like):
        return (0,)
    return (0, 1, 2) if row.name in THREE else (0, 1)


Job = tuple[str, Row, float, int]


class Bench:
    """The runs that a table needs, each made once, several beside each other."""

    def __init__(self, results: Results, make: Maker) -> None:
        self.found = Found(results)
        self.make = make

    def missing(self, cuts: Sequence[str], rows: Sequence[Row]) -> list[Job]:
        """What can be made now: seed 0 at all rates of a row, and once they are there, other seeds at the best."""
        search: list[Job] = []
        others: list[Job] = []
        for row in rows:
            for cut in (cut for cut in cuts if cut in row.cuts):
                searched = BY_NAME[row.like] if row.like else row
                tried = [(cut, searched, lr, 0) for lr in searched.rates or (0.0,)]
                search += [job for job in tried if self.found.run(*job) is None]
                if all(self.found.run(*job) is not None for job in tried):
                    rate = self.found.rate(cut, row) or 0.0
                    others += [(cut, row, rate, s) for s in seeds_of(row) if not self.found.run(cut, row, rate, s)]
        search.sort(key=lambda job: job[1].steps)
        others.sort(key=lambda job: job[1].name not in THREE)
        return list(dict.fromkeys([*search, *others]))

    def run(self, cuts: Sequence[str], rows: Sequence[Row], workers: int) -> None:
        """Make what is missing."""
        results = self.found.results
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            if self.found.dense is None:
                results.add(kind="dense", **pool.submit(self.make, None, "dense", 0.0, 0).result())
                self.found = Found(results)
            running: dict[Future[dict[str, Any]], Job] = {}
            failed: list[Job] = []
            while True:
                for job in self.missing(cuts, rows):
                    if job not in (*running.values(), *failed) and len(running) < workers:
                        cut, row, lr, seed = job
                        running[pool.submit(self.make, cut, row.name, lr, seed)] = job
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    cut, row, lr, seed = job = running.pop(done)
                    if done.exception() is not None:
                        failed.append(job)
                        print(f"{row.name}, {cut}, {lr:.0e}, {seed}:", flush=True)
                        traceback.print_exception(done.exception())
                    else:
                        results.add(kind="result", cut=cut, row=row.name, lr=lr, seed=seed, **done.result())


def table(found: Found, cut: str) -> Iterator[str]:
    """A table in Markdown: medians over seeds, and half the distance between the extremes."""
    yield "| row | mean | own text | WikiText-2 | GSM8K | pairs | tokens | FLOPs | rate | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    if found.dense is not None:
        yield f"| dense | 0 | 0 | 0 | 0 | {found.dense['right']:.1%} | | | | 1 |"
    for row in rows_of(cut):
        runs, rate = found.runs(cut, row), found.rate(cut, row)
        if not runs:
            continue
        values = found.of(cut, row)
        columns = [spread([one[name] for one in values], "{:.3f}".format) for name in ("mean", *TEXTS)]
        columns.append(f"{statistics.median(one['right'] for one in values):.1%}")
        columns += [f"{runs[0]['tokens'] // 1000}k", f"{runs[0]['flops']:.1e}", f"{rate:.0e}" if rate else ""]
        yield f"| {row.name} | {' | '.join(columns)} | {len(runs)} |"


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    for name in TEXTS:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--model", default=MODEL, help="the same model from another place")
    parser.add_argument("--results", type=Path, default=RESULTS / "recovery.jsonl")
    parser.add_argument("--cuts", nargs="*", default=list(CUTS))
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS])
    parser.add_argument("--workers", type=int, default=1, help="runs beside each other")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.command == "run":
        sources = {name: getattr(arguments, name) for name in TEXTS}
        if None in sources.values():
            parser.error("`run` needs --own, --wikitext and --gsm8k")
        maker = Maker(sources, arguments.model, arguments.accelerator)
        rows = [row for row in ROWS if row.name in arguments.rows]
        Bench(results, maker).run(arguments.cuts, rows, arguments.workers)
    found = Found(results)
    if found.dense is not None:
        for cut in CUTS:
            print(f"\n{cut}\n")
            print("\n".join(table(found, cut)))
        entries = targets(found.value, found.dense["loss"]["wikitext"])
        (arguments.results.parent / "targets.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
