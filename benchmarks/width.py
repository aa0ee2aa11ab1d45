"""Width pruning of SmolLM2-135M: every method at the same number of training tokens, for one target shape.

    python benchmarks/width.py run --text wikitext2-valid.txt --other gsm8k-train.jsonl    # hours on a CPU
    python benchmarks/width.py table                                                       # what is there so far

Targets: MLP 1536 -> 1024 channels; 9 query heads over 3 key-value heads -> 6 over 2; 576 -> 432 hidden dimensions; all
of them together. The packages `torch-pruning` and `optipfair` (`pip install torch-pruning optipfair`) cut MLPs alone,
one-shot, to the same parameter count. How rows are run and compared: `benchmarks/quality.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from quality import MODEL, MakeSelector, Row, main

import lightprune as lp
from lightprune.hub import load_causal_lm, load_tokenizer

TARGETS: dict[str, dict[str, int]] = {
    "mlp": {"channels": 1024},
    "heads": {"heads": 6, "kv_groups": 2},
    "hidden": {"hidden": 432},
    "all": {"channels": 1024, "heads": 6, "kv_groups": 2, "hidden": 432},
}
WINDOW = 8  # batches that a selector looks at

KINDS: dict[str, Callable[[int, dict[str, Any]], lp.selectors.Selector]] = {
    "random": lambda seed, counts: lp.RandomUnitSelector(seed=seed, **counts),
    "magnitude": lambda seed, counts: lp.MagnitudeUnitSelector(**counts),
    "activation": lambda seed, counts: lp.ActivationUnitSelector(weighted=True, stop=WINDOW, **counts),
    "taylor": lambda seed, counts: lp.TaylorUnitSelector(stop=WINDOW, **counts),
}


def selectors() -> Iterator[tuple[str, MakeSelector]]:
    """Every kind of selector for every target, by the name `<target> <kind>`."""
    for target, counts in TARGETS.items():
        for kind, make in KINDS.items():
            yield f"{target} {kind}", lambda seed, make=make, counts=counts: make(seed, counts)


def penalty() -> list[Callback]:
    """DReSS: the norms of the groups that go join the loss, up to the cut."""
    return [lp.GroupNormPenalty(strength=1e3, relative=True)]


def proximal() -> list[Callback]:
    """The groups that go shrink to exactly zero, up to the cut."""
    return [lp.ProximalGroupLasso()]


def annealing() -> list[Callback]:
    """What the groups that go contribute fades out, up to the cut."""
    return [lp.GateAnnealing()]


def torch_pruning_mlp(path: Path) -> None:
    """`torch-pruning`, one-shot, group magnitude: two thirds of every MLP's channels stay."""
    import torch_pruning as tp

    lm = load_causal_lm(MODEL)
    lm.config.use_cache = False
    layers = lm.get_submodule("model.layers")
    inner = {layer.mlp.gate_proj: 1 - 1024 / 1536 for layer in layers.children()}
    others = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m not in inner]
    pruner = tp.pruner.BasePruner(
        lm,
        example_inputs=torch.arange(8).unsqueeze(0),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=0.0,
        pruning_ratio_dict=inner,
        ignored_layers=[m for m in others if m.out_features == lm.config.hidden_size or m is lm.lm_head],
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    lm.config.use_cache = True
    lm.config.intermediate_size = int(layers[0].mlp.gate_proj.out_features)
    _save(lm, path)


def optipfair_mlp(path: Path) -> None:
    """`optipfair`, one-shot, peak-to-peak magnitude: two thirds of every MLP's channels stay."""
    from optipfair import prune_model

    lm = prune_model(load_causal_lm(MODEL), pruning_percentage=100 * (1 - 1024 / 1536), show_progress=False)
    _save(lm, path)


def _save(lm: Any, path: Path) -> None:
    assert lm.config.intermediate_size == 1024, lm.config.intermediate_size
    lm.save_pretrained(path)
    load_tokenizer(MODEL).save_pretrained(path)


def rows() -> Iterator[Row]:
    """One-shot, then finetuned, then DReSS in its three forms, for every target and kind of selector."""
    yield Row("dense", trained=False)
    for target in TARGETS:
        for kind in KINDS:
            name = f"{target} {kind}"
            yield Row(f"{name}, untrained", name, trained=False)
    for package in (torch_pruning_mlp, optipfair_mlp):
        title = package.__name__.removesuffix("_mlp").replace("_", "-")
        yield Row(f"mlp {title}, untrained", package=package, trained=False)
        yield Row(f"mlp {title}, then finetuned", package=package)
    for target in TARGETS:
        for kind in KINDS:
            name = f"{target} {kind}"
            yield Row(f"{name}, then finetuned", name)
            yield Row(f"{name}, DReSS annealed", name, annealing, cut=1.0)
            yield Row(f"{name}, DReSS annealed (a quarter), then recovery", name, annealing, cut=0.25)
            yield Row(f"{name}, DReSS proximal", name, proximal, cut=1.0)
            yield Row(f"{name}, DReSS proximal (a quarter), then recovery", name, proximal, cut=0.25)
            yield Row(f"{name}, DReSS penalty", name, penalty, cut=1.0)


if __name__ == "__main__":
    main("width", __doc__, dict(selectors()), tuple(rows()))
