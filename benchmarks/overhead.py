"""What lightprune costs, as ratios against plain Lightning on the same model, interleaved, medians.

    make overhead            # a quarter of an hour on two cores (Linux); prints a table

The model has SmolLM2-135M's shape and random weights. Every round fits each variant in turn for a few steps, so that a
machine whose speed drifts slows all of them alike; a variant's time is the median over its steps of all rounds. Memory
is the peak resident set of a process of its own for each variant.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from memory import forget_peak, memory_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lightprune as lp
from lightprune.metrics import token_losses
from lightprune.surgery import cut_model

LAYERS, DROP = 30, 8
DROPPED = tuple(range(12, 12 + DROP))
BATCH, BLOCK, VOCABULARY = 2, 256, 49152
STEPS, WARMUP = 6, 2
CHANNELS = 1024  # of 1536


def build(layers: int) -> PreTrainedModel:
    """A random Llama of SmolLM2-135M's shape."""
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
        )
    )


class Module(L.LightningModule):
    """A LightningModule as anybody would write it."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = build(layers)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        sums, counts = token_losses(self.lm(input_ids=batch, use_cache=False).logits, batch)
        return sums.sum() / counts.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class StepTimer(Callback):
    """Seconds of every training step but the first ones after `since`, and of its forward and backward passes."""

    def __init__(self, since: int = 0) -> None:
        self.since = since
        self.seconds: list[float] = []
        self.passes: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.since + WARMUP:
            self.passes.append(time.perf_counter() - self._start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self.since + WARMUP:
            self.seconds.append(time.perf_counter() - self._start)


class FixedPlan(lp.RandomSelector):
    """The same layers in every variant, with nothing to score."""

    def __init__(self) -> None:
        super().__init__(drop=DROP)

    def choose_layers(self) -> tuple[list[int], dict[str, Any]]:
        return list(DROPPED), {}


def gates() -> list[Callback]:
    """A gate on every layer, learning beside the weights."""
    return [lp.LayerGateSelector(drop=DROP, rounds=1, steps_per_round=1000, hold_weights=False)]


def penalty() -> list[Callback]:
    """The difference penalty on eight layers."""
    return [FixedPlan(), lp.DifferencePenalty(strength=1e-3, stop=1000)]


def masks() -> list[Callback]:
    """A hard-concrete mask on every unit, still open: nothing is saved yet by what they close."""
    shape = {"layers": 24, "heads": 6, "kv_groups": 2, "channels": CHANNELS, "hidden": 384}
    return [lp.HardConcreteSelector(stop=1000, **shape)]


def before_a_cut(*regularizers: Callback) -> list[Callback]:
    """A third of the channels of every MLP on their way out; the cut never comes."""
    return [lp.RandomUnitSelector(channels=CHANNELS), *regularizers, NoCut(at=1000, validate=False)]


class NoCut(lp.StructuredCut):
    """A cut that may lie beyond the end of the run."""

    def check(self) -> None:
        """Nothing to refuse."""


VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "gates": gates,
    "penalty": penalty,
    "masks": masks,
    "activation scores": lambda: [lp.ActivationUnitSelector(channels=CHANNELS, kv_groups=2, hidden=432, stop=1000)],
    "taylor scores": lambda: [lp.TaylorUnitSelector(channels=CHANNELS, kv_groups=2, hidden=432, stop=1000)],
    "group norms": lambda: before_a_cut(lp.GroupNormPenalty()),
    "proximal": lambda: before_a_cut(lp.ProximalGroupLasso()),
    "annealing": lambda: before_a_cut(lp.GateAnnealing()),
}


def fit(module: L.LightningModule, callbacks: list[Callback], steps: int) -> None:
    """Fit on random tokens for `steps` batches."""
    trainer = L.Trainer(
        **quiet.TRAINER,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (steps * BATCH, BLOCK), generator=generator)
    trainer.fit(module, DataLoader(tokens, batch_size=BATCH))


def time_variants(rounds: int) -> dict[str, list[float]]:
    """Seconds: steps of every variant, after a cut, and of a fresh model of that shape; cuts; forward passes."""
    seconds: dict[str, list[float]] = defaultdict(list)
    dense, small = Module(), Module(LAYERS - DROP)

    def variant(name: str) -> None:
        timer = StepTimer()
        fit(dense, [timer, *VARIANTS[name]()], STEPS)
        seconds[name] += timer.seconds
        if name == "plain":
            seconds["forward and backward"] += timer.passes

    def fresh_small() -> None:
        timer = StepTimer()
        fit(small, [timer], STEPS)
        seconds["fresh small model"] += timer.seconds

    def after_the_cut() -> None:
        module, cut, timer = Module(), lp.StructuredCut(at=2), StepTimer(since=2)
        fit(module, [timer, FixedPlan(), cut], 2 + STEPS)
        seconds["after the cut"] += timer.seconds
        seconds["cut"].append(cut.seconds)
        time_forward(dense.lm, module.lm, seconds)

    turns = [*(partial(variant, name) for name in VARIANTS), fresh_small, after_the_cut]
    for number in range(rounds):
        # Each takes each place in turn: what ran before leaves the allocator in another state.
        for place in range(len(turns)):
            turns[(number + place) % len(turns)]()
            gc.collect()
    return seconds


@torch.no_grad()
def time_forward(dense: PreTrainedModel, cut: PreTrainedModel, seconds: dict[str, list[float]]) -> None:
    """Forward passes in turn, appended to `seconds`."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, BLOCK))
    for index in range(WARMUP + STEPS):
        for name, model in (("forward, dense", dense), ("forward, cut", cut)):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=tokens, use_cache=False)
            if index >= WARMUP:
                seconds[name].append(time.perf_counter() - start)


def forward_flops(layers: int) -> float:
    """Multiply-adds of a forward pass, a token: projections, causal attention over the block, and the head."""
    hidden, mlp, kv = 576, 1536, 192
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * mlp + BLOCK * hidden
    return layers * layer + hidden * VOCABULARY


def in_a_process(*arguments: str) -> Any:
    """What this file prints last when it is run with these arguments."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_memory(variant: str) -> float:
    """Peak resident bytes of a process that trains a few steps of a variant."""
    return float(in_a_process("--memory-of", variant))


def cut_large() -> dict[str, float]:
    """Cut a random 1.1B-parameter Llama in bfloat16 in every structure: seconds, and peak over the model's bytes."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    anatomy = lp.anatomy_of(lm)
    size = 2 * anatomy.num_parameters
    plan = lp.PruningPlan.keeping(
        anatomy,
        layers=[layer for layer in range(22) if layer not in range(10, 14)],
        heads=[[head for head in range(32) if head // 8 != layer % 4 and head % 8 != layer % 8] for layer in range(22)],
        channels=[[(layer + 13 * i) % 5632 for i in range(4096)] for layer in range(22)],
        hidden=[i for i in range(2048) if i % 8],
    )
    gc.collect()
    forget_peak()
    before = memory_of("VmRSS")
    start = time.perf_counter()
    cut_model(anatomy, plan)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": (memory_of("VmHWM") - before + size) / size}


def rounds_of(values: list[float], rounds: int) -> list[list[float]]:
    """The values of each round: every round has as many."""
    size = len(values) // rounds
    return [values[size * number : size * (number + 1)] for number in range(rounds)]


def over(seconds: dict[str, list[float]], rounds: int, name: str, base: str) -> tuple[float, str]:
    """The ratio of the medians, and the least and the greatest of the ratios of single rounds."""
    ratios = [
        statistics.median(own) / statistics.median(of_base)
        for own, of_base in zip(rounds_of(seconds[name], rounds), rounds_of(seconds[base], rounds), strict=True)
    ]
    return statistics.median(seconds[name]) / statistics.median(
        seconds[base]
    ), f"{min(ratios):.3f} to {max(ratios):.3f}"


def main() -> None:
    """Measure, and print a Markdown table and the medians behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--cut-large", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet.be_quiet()
    if arguments.memory_of:
        fit(Module(), VARIANTS[arguments.memory_of](), 4)
        print(memory_of("VmHWM"))
        return
    if arguments.cut_large:
        print(json.dumps(cut_large()))
        return
    large = in_a_process("--cut-large")
    seconds = time_variants(arguments.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {
        name: statistics.median(peak_memory(name) for _ in range(2)) for name in ("plain", "gates", "penalty", "masks")
    }
    flops = forward_flops(LAYERS - DROP) / forward_flops(LAYERS)
    ratio = partial(over, seconds, arguments.rounds)
    of_steps, of_passes = partial(ratio, base="plain"), partial(ratio, base="forward and backward")
    rows = [
        ("step with gates / plain", *of_steps("gates"), "<= 1.03"),
        ("step with difference penalty / plain", *of_steps("penalty"), "<= 1.05"),
        ("step with hard-concrete masks / plain", *of_steps("masks"), "<= 1.10"),
        ("activation scores / forward and backward", *of_passes("activation scores"), "<= 1.15"),
        ("Taylor scores / forward and backward", *of_passes("taylor scores"), "<= 1.15"),
        ("step with group norm penalty / plain", *of_steps("group norms"), "<= 1.05"),
        ("step with proximal group lasso / plain", *of_steps("proximal"), "<= 1.05"),
        ("step with annealed channels / plain", *of_steps("annealing"), "<= 1.05"),
        ("peak memory with gates / plain", memory["gates"] / memory["plain"], "", "<= 1.02"),
        ("peak memory with difference penalty / plain", memory["penalty"] / memory["plain"], "", "<= 1.02"),
        ("peak memory with hard-concrete masks / plain", memory["masks"] / memory["plain"], "", "<= 1.03"),
        ("the cut / a training step", median["cut"] / median["plain"], "", "<= 1"),
        ("speed after the cut / fresh small model", *ratio("fresh small model", "after the cut"), ">= 0.98"),
        (
            "forward cut / dense, over their FLOPs",
            median["forward, cut"] / median["forward, dense"] / flops,
            "",
            "<= 1.03",
        ),
        ("cut of 1.1B parameters in every structure, seconds", large["seconds"], "", "< 10"),
        ("its peak memory / the model's", large["peak"], "", "< 1.3"),
    ]
    print("| what | measured | single rounds | target |\n|---|---|---|---|")
    print("\n".join(f"| {name} | {value:.3f} | {spread} | {target} |" for name, value, spread, target in rows))
    print(
        json.dumps({"medians_s": median, "peak_bytes": memory, "rounds": arguments.rounds, "torch": torch.__version__})
    )


if __name__ == "__main__":
    main()
