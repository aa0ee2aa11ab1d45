"""What the cuts of a running fit leave behind in memory, and what one needs: two processes under each strategy.

    python benchmarks/rebuild.py                       # all strategies, a quarter of an hour on two cores (Linux)
    python benchmarks/rebuild.py --strategies zero3    # one of them

The model is a random Llama of 124 million parameters in float32, trained by AdamW. In the first run, 20 cuts in a row
take one MLP channel from every layer each, a step after another, so that what is resident should stay as it is: the
growth for each cut is the slope of a line through what is resident after each of them. (The plans of all cuts are kept
for checkpoints and the summary: 41,000 indices each.) In the second, 8 of the 24 layers go at once, and the highest
that is resident in the course of the cut is compared with the highest in the training steps before it. The rank that
fares worst counts. Large tensors are mapped by themselves, so that what is freed is resident no longer.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from memory import forget_peak, memory_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import lightprune as lp

LAYERS, CHANNELS, VOCABULARY = 24, 1728, 8192
CUTS, FIRST = 20, 3  # how many, and the step of the first one
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # of glibc


class Module(L.LightningModule):
    """A LightningModule as anybody would write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=640,
            intermediate_size=CHANNELS,
            num_hidden_layers=LAYERS,
            num_attention_heads=10,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
        )
        self.lm = AutoModelForCausalLM.from_config(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.lm(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class Resident(Callback):
    """Bytes resident after each of the cuts."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > FIRST:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.bytes.append(memory_of("VmRSS"))


class CutWithPeak(lp.StructuredCut):
    """Notes the highest that was resident in the steps before the cut, the first one apart, and in the cut."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_start(trainer, *args, **kwargs)
        if trainer.global_step == 1:
            forget_peak()

    def _cut(self, step: int) -> None:
        self.training = memory_of("VmHWM")
        forget_peak()
        super()._cut(step)
        self.cutting = memory_of("VmHWM")


def strategy_of(name: str) -> Any:
    """Lightning's strategy of a name among `STRATEGIES`."""
    if not name.startswith("zero"):
        return {"single": "auto"}.get(name, name)
    # Below that threshold, parameters would stay whole under stage 3.
    settings = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": settings}
    return lp.strategies.CPUDeepSpeedStrategy(config=config)


def fit(strategy: str, callbacks: list[Callback], steps: int) -> L.Trainer:
    """Fit on random tokens."""
    trainer = L.Trainer(
        **quiet.TRAINER,
        devices=1 if strategy == "single" else 2,
        strategy=strategy_of(strategy),
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
    )
    tokens = torch.randint(0, VOCABULARY, (2 * steps, 64), generator=torch.Generator().manual_seed(0))
    trainer.fit(Module(), DataLoader(tokens, batch_size=1))
    return trainer


def worst(trainer: L.Trainer, value: float) -> float:
    """The largest of all ranks' values."""
    return max(lp.strategies.adapter_of(trainer).gather(value))


def growth(strategy: str) -> float:
    """By which share of what is resident it grows with each cut."""
    parts: list[Callback] = [Resident()]
    for index in range(CUTS):
        step = FIRST + index
        parts.append(lp.RandomUnitSelector(channels=CHANNELS - 1 - index, start=step, multiple_of=1))
        parts.append(lp.StructuredCut(at=step, validate=False))
    trainer = fit(strategy, parts, FIRST + CUTS + 1)
    resident = parts[0].bytes
    slope, _ = statistics.linear_regression(range(len(resident)), resident)
    return worst(trainer, slope / resident[0])


def peak(strategy: str) -> float:
    """The highest that is resident during a cut of 8 layers, over the highest in training."""
    cut = CutWithPeak(at=FIRST, validate=False)
    trainer = fit(strategy, [lp.RandomSelector(drop=8), cut], FIRST + 1)
    return worst(trainer, cut.cutting / cut.training)


MEASURED: dict[str, Callable[[str], float]] = {"growth": growth, "peak": peak}


def main() -> None:
    """Measure under each strategy in processes of their own, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--measure", choices=tuple(MEASURED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet.be_quiet()
    if arguments.measure is not None:
        (strategy,) = arguments.strategies
        value = MEASURED[arguments.measure](strategy)
        rank_zero_only(print)(json.dumps({arguments.measure: value}), flush=True)
        return
    print("| strategy | growth for each of 20 cuts | peak of a cut of 8 layers / of training |\n|---|---|---|")
    for strategy in arguments.strategies:
        values = {}
        for what in MEASURED:
            command = [sys.executable, __file__, "--strategies", strategy, "--measure", what]
            printed = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | MAPPED
            ).stdout
            values |= json.loads(next(line for line in printed.splitlines() if line.startswith(f'{{"{what}"')))
        print(f"| {strategy} | {100 * values['growth']:+.2f}% | {values['peak']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
