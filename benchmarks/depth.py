"""Depth pruning of SmolLM2-135M, 8 of 30 layers: every method at the same number of training tokens.

    python benchmarks/depth.py run --text wikitext2-valid.txt --other gsm8k-train.jsonl    # hours on a CPU
    python benchmarks/depth.py table                                                       # what is there so far

How rows are run and compared: `benchmarks/quality.py`.
"""

from lightning.pytorch.callbacks import Callback
from quality import MakeSelector, Row, main

import lightprune as lp

DROP = 8

SELECTORS: dict[str, MakeSelector] = {
    "ShortGPT": lambda seed: lp.BlockInfluenceSelector(drop=DROP, stop=8),
    "SLEB": lambda seed: lp.GreedyPerplexitySelector(drop=DROP, stop=3),
    "random": lambda seed: lp.RandomSelector(drop=DROP, seed=seed),
    "gates, l1 = 5e-3": lambda seed: lp.LayerGateSelector(
        drop=DROP, steps_per_round=5, lr=0.04, l1=5e-3, protect_last=3
    ),
    "gates on outputs": lambda seed: lp.LayerGateSelector(
        drop=DROP, steps_per_round=5, lr=0.04, l1=0.05, placement="output", protect_last=3
    ),
    "gates": lambda seed: lp.LayerGateSelector(drop=DROP, steps_per_round=5, lr=0.04, l1=0.05, protect_last=3),
}


def annealing() -> list[Callback]:
    """The layers fade out up to the cut."""
    return [lp.GateAnnealing()]


def penalty() -> list[Callback]:
    """The difference penalty up to the cut, on the scale of the residual stream."""
    return [lp.DifferencePenalty(strength=0.1, relative=True)]


ROWS = (
    Row("dense", trained=False),
    Row("dense, finetuned"),
    Row("ShortGPT, untrained", "ShortGPT", trained=False),
    Row("SLEB, untrained", "SLEB", trained=False),
    Row("random, untrained", "random", trained=False),
    Row("gates, untrained (TRSP without stage 2)", "gates", trained=False),
    Row("gates with the paper's l1 = 5e-3, untrained", "gates, l1 = 5e-3", trained=False),
    Row("gates on whole outputs, untrained", "gates on outputs", trained=False),
    Row("ShortGPT, then finetuned", "ShortGPT"),
    Row("SLEB, then finetuned", "SLEB"),
    Row("gates, then finetuned", "gates"),
    Row("random, then finetuned", "random"),
    Row("TRSP, penalty", "gates", penalty, cut=1.0),
    Row("TRSP, annealing", "gates", annealing, cut=1.0),
    Row("ELDeR, penalty (half), then recovery", "gates", penalty, cut=0.5),
    Row("ELDeR, annealing (a quarter), then recovery", "gates", annealing, cut=0.25),
    Row("ELDeR with the paper's l1, annealing (a quarter), then recovery", "gates, l1 = 5e-3", annealing, cut=0.25),
    Row("penalty, all before the cut; SLEB's layers", "SLEB", penalty, cut=1.0),
    Row("annealing, all before the cut; SLEB's layers", "SLEB", annealing, cut=1.0),
    Row("annealing (a quarter), then recovery; SLEB's layers", "SLEB", annealing, cut=0.25),
)


if __name__ == "__main__":
    main("depth", __doc__, SELECTORS, ROWS)
